"""The host loop: what it writes, and that a run which was ended in any way goes on as if it never had been."""

import json
import random
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import OF_THE_START, home, last_step, rows, run, run_until  # noqa: F401 (home is a fixture)

from kdjax import config as configs
from kdjax import manifest
from kdjax.checkpoint import open_params
from kdjax.data import Data
from kdjax.errors import UserError
from kdjax.job import Job
from kdjax.lock import lock_run
from kdjax.train import train

STEPS = 300
FLAGS = ("--steps", STEPS, "--checkpoint.every", 7, "--eval-every", 40)


@pytest.fixture(scope="module")
def config(home):  # noqa: F811
    return configs.load(str(home / "tiny.py"))


@pytest.fixture(scope="module")
def finished(home, config):  # noqa: F811
    train(config, home / "finished")
    return home / "finished"


@pytest.fixture
def done(finished, tmp_path):
    """A finished run to do with as one likes."""
    return shutil.copytree(finished, tmp_path / "done")


@pytest.fixture(scope="module")
def whole(home):  # noqa: F811
    """A longer run, by a process of its own, that nothing ended."""
    ended = run(home, "train", "tiny.py", "--run-dir", "whole", *FLAGS)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    return home / "whole"


@pytest.fixture(scope="module")
def ended(home, whole):  # noqa: F811
    """The same run, ended three times on its way: by SIGKILL, SIGTERM and SIGINT; and what each process said."""
    directory, said = home / "ended", []
    commands = {
        signal.SIGKILL: ("train", "tiny.py", "--run-dir", directory, *FLAGS),
        signal.SIGTERM: ("train", "tiny.py", "--run-dir", directory, *FLAGS),
        signal.SIGINT: ("train", directory),
    }
    for number, command in commands.items():
        at = max(last_step(directory), 0) + random.SystemRandom().randrange(8, 40)
        said.append(run_until(home, directory, at, number, *command))
    last = run(home, "train", directory)
    said.append((last.returncode, last.stderr))
    return directory, said


def summary(directory):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads((directory / "summary.json").read_text(), parse_constant=refuse)


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
def test_a_run_ended_by_signals_goes_on_bit_by_bit(whole, ended):
    directory, said = ended
    assert [code for code, _ in said] == [-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT, 0], said
    assert rows(directory) == rows(whole)
    assert [row["step"] for row in rows(whole) if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(whole) if "eval_kl" in row] == [*range(0, STEPS, 40), STEPS]


@pytest.mark.slow
def test_a_run_ended_by_signals_ends_with_the_same_parameters(whole, ended):
    parameters = [open_params(directory, STEPS).params for directory in (whole, ended[0])]
    jax.tree.map(np.testing.assert_array_equal, *parameters)


@pytest.mark.slow
def test_a_run_ended_by_signals_has_the_same_summary(whole, ended):
    taken = ("seconds", "tokens_per_second_train", "tokens_per_second_student", "tokens_per_second_teacher")
    taken += OF_THE_START
    ours, theirs = (
        {name: value for name, value in summary(directory).items() if name not in taken}
        for directory in (ended[0], whole)
    )
    assert ours == theirs
    assert ours["kl_before"] == rows(whole)[0]["eval_kl"]
    assert set(ours["continuations"]) == {"teacher", "student before", "student after"}


@pytest.mark.slow
def test_a_stopped_run_says_so_in_one_line(ended):
    directory, ((_, killed), (_, terminated), (_, interrupted), (_, last)) = ended
    assert killed == ""
    for said, name in ((terminated, "SIGTERM"), (interrupted, "SIGINT")):
        *resumed, stopped = said.splitlines()  # a run killed before its first save was whole starts anew
        assert len(resumed) <= 1 and all(line.startswith(f"kdjax: {directory} goes on after step ") for line in resumed)
        assert stopped.startswith(f"kdjax: stopped by {name} after step ")
        assert stopped.endswith(f"is saved; `kdjax train {directory}` goes on")
    assert last.splitlines() == [
        interrupted.splitlines()[-1].split(",")[0].replace("stopped by SIGINT", f"{directory} goes on")
    ]


@pytest.mark.slow
def test_seconds_add_up_over_the_processes_of_a_run(ended):
    directory, _ = ended
    steps = sum(row.get("seconds", 0) for row in rows(directory, times=True))
    assert summary(directory)["seconds"] > steps > 0


def test_every_row_has_its_learning_rate_and_how_long_it_took(finished, config):
    trained = [row for row in rows(finished, times=True) if "loss" in row]
    top, warm = config.optim.learning_rate, [1 / 3, 2 / 3, 1]
    np.testing.assert_allclose([row["learning_rate"] for row in trained], [top * x for x in [*warm, 0.5]], rtol=1e-6)
    assert all(row["seconds"] > 0 for row in trained)


def test_a_finished_run_is_not_trained_again(done, config, monkeypatch):
    before = contents(done)
    monkeypatch.setattr(Data, "train", None)
    again = train(config, done)
    assert contents(done) == before
    assert again == summary(done)


def test_a_run_killed_before_its_last_evaluation_makes_it(done, config):
    metrics, wanted = done / "metrics.jsonl", rows(done)
    *kept, last = metrics.read_text().splitlines(keepends=True)
    assert "eval_kl" in last
    metrics.write_text("".join(kept))
    old = summary(done)
    (done / "summary.json").write_text(json.dumps({name: old[name] for name in old if name != "steps"}))
    train(config, done)
    assert rows(done) == wanted
    assert summary(done)["kl_after"] == old["kl_after"]


def test_a_run_interrupted_while_it_is_summed_up_ends_at_once_and_goes_on(done, config, monkeypatch):
    """Summing up may take minutes, as where a prompt's recovery is measured; all steps are saved by then."""
    old = summary(done)
    (done / "summary.json").write_text(json.dumps({name: old[name] for name in old if name != "steps"}))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background ignore it
    with monkeypatch.context() as patch:
        patch.setattr("kdjax.summary.closing", lambda *given: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(config, done)
    signal.signal(signal.SIGINT, before)
    assert "steps" not in summary(done)
    assert train(config, done)["kl_after"] == old["kl_after"] and summary(done)["steps"] == old["steps"]


def test_a_damaged_summary_is_written_anew(done, config, caplog):
    old = summary(done)
    (done / "summary.json").write_text('{"kl_before": 1')
    train(config, done)
    assert summary(done)["kl_before"] == old["kl_before"]
    assert "summary.json is damaged" in caplog.text


def test_another_config_is_refused_and_nothing_is_lost(done, config):
    before = contents(done)
    other = replace(config, steps=9, optim=replace(config.optim, name="lion"))
    with pytest.raises(UserError, match=r"optim.name: 'adamw' -> 'lion'; steps: 4 -> 9"):
        train(other, done)
    assert contents(done) == before


def test_another_config_starts_anew_where_no_step_is_saved(done, config):
    shutil.rmtree(done / "checkpoints")
    train(replace(config, steps=2, optim=replace(config.optim, warmup_steps=0)), done)
    assert [row["step"] for row in rows(done)] == [0, 1, 2, 2]
    assert summary(done)["steps"] == 2
    assert configs.load(str(done)).steps == 2


def test_a_directory_of_something_else_is_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds 'thesis.tex' but no run"):
        train(config, tmp_path)


def test_a_directory_in_use_is_refused(done, config):
    with lock_run(done), pytest.raises(UserError, match="is in use by process"):
        train(config, done)


def spoil(monkeypatch, steps):
    """Make the batches of some steps such that their loss is not finite."""
    train_batches = Data.train

    def spoilt(self, state=None, **options):
        for batch, after in train_batches(self, state, **options):
            factor = np.float32(np.nan if after["step"] in steps else 1)
            yield replace(batch, kd_weight_BR=batch.kd_weight_BR * factor), after

    monkeypatch.setattr(Data, "train", spoilt)


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path, config, monkeypatch):
    spoil(monkeypatch, {2})
    train(config, tmp_path)
    trained = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["skipped"] for row in trained] == [0, 1, 1, 1]
    assert [row["loss"] is None for row in trained] == [False, True, False, False]
    assert trained[1]["learning_rate"] == trained[2]["learning_rate"]
    assert summary(tmp_path)["skipped"] == 1


@pytest.mark.slow
def test_debug_names_where_numbers_are_not_finite(tmp_path, config, monkeypatch):
    """A student whose weights are NaN: the run stops at the first step, naming the student's hidden states alone."""
    start = Job.start

    def spoilt(job):
        state = start(job)
        return replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))

    monkeypatch.setattr(Job, "start", spoilt)
    config = replace(config, objective=replace(config.objective, debug=True))
    with pytest.raises(UserError, match=r"^step 1: not finite: student_hidden \(\d+ numbers\); look at the weights"):
        train(config, tmp_path)


@pytest.mark.slow
def test_numbers_that_stay_bad_end_the_run_and_leave_the_last_good_state(tmp_path, config, monkeypatch):
    config = replace(config, steps=12, abort_after=4, checkpoint=replace(config.checkpoint, every=1, keep=2))
    with monkeypatch.context() as patch:
        spoil(patch, range(4, 99))
        with pytest.raises(UserError, match="not finite 4 times in a row, up to step 7; step 3 is the newest saved"):
            train(config, tmp_path / "broken")
    assert manifest.step_numbers(tmp_path / "broken" / "checkpoints") == [2, 3]
    train(config, tmp_path / "broken")
    train(config, tmp_path / "clean")
    assert rows(tmp_path / "broken") == rows(tmp_path / "clean")


def test_without_held_out_text_there_is_nothing_to_evaluate(tmp_path, config):
    figures = train(replace(config, data=replace(config.data, eval_fraction=0.0)), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert not any(name.startswith(("kl", "perplexity")) for name in figures)
    assert manifest.best_step(tmp_path / "checkpoints") is None


def test_a_summary_that_is_not_finite_is_json(done, config):
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    lines[0]["eval_kl"] = None  # what an evaluation that is not finite leaves
    (done / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (done / "summary.json").unlink()
    train(config, done)
    assert summary(done)["kl_before"] is None
