"""A search as a whole: it finds what was planted, pays once, goes on after a kill, and says what it found."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

import pytest
import tiny_search

from kdjax import config as configs
from kdjax import search as job
from kdjax.cli import main
from kdjax.data.chat import render
from kdjax.errors import UserError
from kdjax.fields import from_json, to_json
from kdjax.prompts.bench import PRIOR
from kdjax.prompts.config import PromptsConfig, SpeakerConfig
from kdjax.prompts.speaker import Said, Weighed
from kdjax.prompts.splits import read_examples, split_as
from kdjax.prompts.tasks import TASKS, Candidate, Example, show
from kdjax.search import search

ROOT = Path(__file__).parents[2]
FILES = ("prompts.jsonl", "best.txt", "evaluations.jsonl")
WORDS = ("please", "now", "carefully", "always", "briefly", "not", "just", "then")


def chance(*parts):
    return int.from_bytes(blake2b("|".join(parts).encode(), digest_size=4).digest()) / 2**32


class Stub:
    """Knows the answer the likelier the more of some words stand in the instruction; fails at a call if it is to."""

    name = "stub"

    def __init__(self, fails_at=-1):
        self.calls, self.weighed, self.fails_at = 0, [], fails_at

    def weigh(self, pairs):
        self._call()
        self.weighed += pairs
        return [Weighed(self._log_prob(*pair), len(pair[0]), 1) for pair in pairs]

    def _log_prob(self, prompt, label):
        text = prompt[prompt.rindex("Text: ") + 6 :].split("\n")[0]
        if not text.startswith("number "):
            return 0.0
        skill = sum(word in prompt for word in WORDS) / 8 + 0.05 * prompt.count("Label: ")
        right = "up" if int(text.split()[1]) % 2 else "down"
        knows = chance(prompt.split("\n")[0], text) < skill
        return 0.0 if (label == right) == knows else -2.0

    def say(self, prompts, how):
        self._call()
        return [Said(f"Do it {WORDS[int(chance(prompt, str(how.seed)) * 8)]}.", 5) for prompt in prompts]

    def _call(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt


@pytest.fixture
def config(tmp_path):
    rows = [{"n": n, "way": "up" if n % 2 else "down"} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    plain = [f"Go {chr(97 + n)}." for n in range(9)]
    return PromptsConfig(
        task="classification",
        sources=(f"jsonl:{tmp_path / 'rows.jsonl'}",),
        input="number {{ n }}",
        answer="{{ way }}",
        labels=("up", "down"),
        instructions=("Go please, now, carefully, always, briefly.", *plain),
        methods=("ape", "critique", "grips", "shots"),
        budget=900,
        propose_rows=20,
        select_rows=60,
        test_rows=80,
        scorer=SpeakerConfig("stub"),
        proposer=SpeakerConfig("stub", batch_size=2),
    )


@pytest.fixture
def stub(monkeypatch):
    """Let searches ask a stub; return how to make one."""

    def use(**more):
        speaker = Stub(**more)
        monkeypatch.setattr(job, "open_speaker", lambda spec: speaker)
        return speaker

    use()
    return use


def written(directory):
    timeless = json.loads((directory / "summary.json").read_text())
    del timeless["seconds"], timeless["environment"]
    rows = sorted((directory / "evaluations.jsonl").read_text().splitlines())
    return timeless, rows, *((directory / name).read_text() for name in ("prompts.jsonl", "best.txt"))


def test_it_finds_what_was_planted_and_reports_once(config, stub, tmp_path):
    stub()
    found = search(config, tmp_path / "run")
    best = found["best"]["text"]
    assert sum(word in best for word in WORDS) >= 4
    assert found["test"]["best"]["low"] > found["test"]["random"]["high"] and found["gains"]["random"]["low"] > 0
    wanted = [one.answer for one in split_as(config, read_examples(config.sources, config.input, config.answer)).test]
    shares = [wanted.count(label) / len(wanted) for label in config.labels]
    assert found["test"]["commonest"]["score"] in shares and found["gains"]["commonest"]["low"] > 0
    assert found["gap"] == pytest.approx(found["selection"]["score"] - found["test"]["best"]["score"])
    assert 0 < found["evaluations"]["select"] <= 900 < found["candidates"] * 60
    taken = found["tokens"]["select"] + found["tokens"]["propose"]
    assert 0.6 * taken < found["tokens"]["few_shot"] < 1.1 * taken
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    seen = {part: {row["example"] for row in rows if row["part"] == part} - {PRIOR} for part in found["tokens"]}
    assert not seen["test"] & (seen["select"] | seen["propose"] | seen["few_shot"])
    assert seen["propose"] and not seen["select"] & seen["propose"]
    assert seen["few_shot"] <= seen["select"] and len(seen["test"]) == found["examples"]["test"] <= 80
    assert len({(row["part"], row["candidate"], row["example"]) for row in rows}) == len(rows)
    assert found["tokens"] == {part: sum(row["tokens"] for row in rows if row["part"] == part) for part in seen}
    paid = Counter(row["part"] for row in rows if row["example"] != PRIOR)
    assert found["evaluations"] == paid


def test_candidates_are_written_with_where_they_come_from(config, stub, tmp_path):
    found = search(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    ids = {row["id"] for row in rows}
    assert len(ids) == len(rows) == found["candidates"] and all(set(row["parents"]) <= ids for row in rows)
    assert {row["method"] for row in rows} == {"given", "ape", "critique", "grips", "shots"}
    (best,) = [row for row in rows if row["is_best"]]
    assert best["id"] == found["best"]["id"] and best["scores"][-1]["mean"] == found["selection"]["score"]
    assert all(row["scores"] and row["evaluations"] == row["scores"][-1]["examples"] for row in rows)
    winner = Candidate(best["text"], tuple(Example(**shot) for shot in best["shots"]))
    said = []
    view = (tmp_path / "run" / "best.txt").read_text()
    render(view, {"n": 7, "chat": lambda turns: said.append(turns[0]["content"]) or ""}, strict=True)
    assert said == [show(TASKS["classification"], winner, "number 7")]


def test_rounds_pass_on_the_best_and_critics_see_failures_alone(config, stub, tmp_path, monkeypatch):
    shops, parents, propose = [], [], job.propose

    def watched(workshop, methods, alive, count, seed):
        shops.append(workshop)
        parents.append(alive)
        return propose(workshop, methods, alive, count, seed)

    monkeypatch.setattr(job, "propose", watched)
    search(replace(config, beam=2), tmp_path / "run")
    assert [len(alive) for alive in parents] == [10, 2]
    rows = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    means = {row["id"]: row["scores"][0]["mean"] for row in rows}
    assert all(means[one.id] > 0.5 for one in parents[1])
    bench = shops[0].failures.__closure__[0].cell_contents
    for candidate in parents[0][:3]:
        failures = shops[0].failures(candidate)
        assert 0 < len(failures) <= 4 and all(said != example.answer for example, said in failures)
        assert all(bench.known("propose", candidate, example) == 0.0 for example, _ in failures)
    assert shops[0].failures(Candidate("Go " + " ".join(WORDS))) == []


@pytest.mark.parametrize("selector", ["halving", "ucb"])
def test_a_search_that_was_stopped_anywhere_goes_on_and_pays_for_nothing_twice(config, stub, tmp_path, selector):
    config = replace(config, selector=selector)
    whole = stub()
    search(config, tmp_path / "whole")
    wanted = written(tmp_path / "whole")
    run = tmp_path / "run"
    weighed = []
    for number in range(2, 40, 4):
        broken = stub(fails_at=number)
        try:
            search(config, run)
        except KeyboardInterrupt:
            with (run / "evaluations.jsonl").open("a") as file:
                file.write('{"part": "select", "torn')
        weighed += broken.weighed
    last = stub()
    search(config, run)
    assert written(run) == wanted
    assert sorted(weighed + last.weighed) == sorted(whole.weighed)
    again = stub()
    search(config, run)
    assert written(run) == wanted and again.calls == 0


def test_a_seed_repeats_and_another_differs(config, stub, tmp_path):
    for name in "ab":
        search(config, tmp_path / name)
    assert written(tmp_path / "a") == written(tmp_path / "b")
    search(replace(config, seed=1), tmp_path / "c")
    assert written(tmp_path / "c")[2] != written(tmp_path / "a")[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instructions": (), "methods": ("grips", "shots")}, "there is no candidate: give instructions"),
        ({"labels": ("up", "left")}, "'down' is none of the labels"),
        ({"budget": 20}, "10 evaluations a round are too few to select among"),
        ({"sources": ("jsonl:none.jsonl",)}, "names no file"),
        ({"propose_rows": 1}, "wanted 2 each: give more rows"),
        ({"measure": "rouge_l"}, "unknown measure 'rouge_l'"),
        ({"instructions": ("@none.txt",)}, "none.txt cannot be read"),
        ({"methods": ("shots",), "shots": 0}, "raise shots to at least 1"),
        ({"methods": ("ape",), "proposer": SpeakerConfig()}, "set proposer.source"),
    ],
)
def test_what_cannot_be_is_one_line(config, stub, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        search(replace(config, **change), tmp_path / "run")


def test_configs_are_checked():
    known = {"scorer": SpeakerConfig("x")}
    for wrong, said in [
        ({}, "scorer.source names no model"),
        ({"methods": ("grip",), **known}, "unknown method 'grip'; did you mean 'grips'"),
        ({"rounds": 0, **known}, "rounds is 0; wanted at least 1"),
        ({"scorer": SpeakerConfig("http://host/v1")}, "name its model in scorer.model"),
        ({"proposer": SpeakerConfig("x", batch_size=0), **known}, "proposer.batch_size is 0"),
        ({"critic": SpeakerConfig("x", timeout=0), **known}, "critic.timeout is 0"),
    ]:
        with pytest.raises(UserError, match=said):
            PromptsConfig(**wrong)
    config = PromptsConfig(**known, labels=("a", "b"))
    assert from_json(to_json(config), PromptsConfig) == config
    changed = configs.override(config, ["--scorer.batch-size", "3", "--labels", "c", "d", "--no-calibrated"], "kdjax")
    assert (changed.scorer.batch_size, changed.labels, changed.calibrated) == (3, ("c", "d"), False)
    with pytest.raises(UserError, match="unknown flag --scorer.bach-size; did you mean --scorer.batch-size"):
        configs.override(config, ["--scorer.bach-size", "3"], "kdjax")


def test_another_search_in_the_directory_is_refused(config, stub, tmp_path):
    search(config, tmp_path / "run")
    with pytest.raises(UserError, match="holds a job whose config differs .seed: 0 -> 1"):
        search(replace(config, seed=1), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds 'mine.txt' but no job"):
        search(config, tmp_path / "other")


def test_instructions_come_from_a_file_too(config, stub, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"prompt": "Go now."}\n{"prompt": "Go please."}\n')
    config = replace(config, instructions=("Go.", f"@{tmp_path / 'more.jsonl'}", "Go now."))
    assert [one.text for one in job.given(config)] == ["Go.", "Go now.", "Go please."]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a tiny model, rows, and a config in search.json."""
    directory = tmp_path_factory.mktemp("tiny")
    config = tiny_search.write(directory)
    (directory / "search.json").write_text(json.dumps(asdict(config)))
    return directory


def test_a_real_model_finds_the_instruction_that_was_planted(tiny, capsys):
    flags = ("--rounds", "1", "--budget", "120", "--test-rows", "16", "--few-shot-baseline", "0", "--methods", "grips")
    with redirect_stdout(io.StringIO()) as out:
        code = main(["prompts", str(tiny / "search.json"), "--run-dir", str(tiny / "run"), *flags])
    assert code == 0, capsys.readouterr().err
    summary = json.loads((tiny / "run" / "summary.json").read_text())
    assert summary["best"]["text"] == tiny_search.PLANTED and summary["test"]["best"]["score"] == 1.0
    assert summary["test"]["random"]["score"] < 1.0
    for words in ("the winner", "1.000 (1.000 to 1.000)", "a candidate at random", tiny_search.PLANTED, "best.txt"):
        assert words in out.getvalue()
    with redirect_stdout(io.StringIO()):
        assert main(["prompts", str(tiny / "run"), "--scorer.batch-size", "2"]) == 2
    assert "config differs (scorer.batch_size: 16 -> 2)" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_in_one_line(tiny, capsys):
    long = ("--input", "{{ text * 200 }}", "--run-dir", str(tiny / "long"))
    for said, *arguments in (
        ("which config?",),
        ("wanted a kdjax.prompts.config.PromptsConfig", str(ROOT / "configs" / "smoke.py")),
        ("unknown flag --bugdet; did you mean --budget", str(tiny / "search.json"), "--bugdet", "3"),
        ("longer than the 512 positions of", str(tiny / "search.json"), *long),
    ):
        assert main(["prompts", *arguments]) == 2
        err = capsys.readouterr().err.splitlines()
        assert said in err[-1] and err[-1].startswith("kdjax: ")
    assert main(["prompts", "--help"]) == 0 and main(["prompts", str(tiny / "search.json"), "--help"]) == 0
    assert "--few-shot-baseline" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_equal_result(tiny):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

    def begin(name):
        command = [sys.executable, "-m", "kdjax", "prompts", str(tiny / "search.json"), "--run-dir", str(tiny / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def rows(name):
        path = tiny / name / "evaluations.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    assert begin("whole").wait(240) == 0
    for least in (1, 65, 200):
        process, end = begin("killed"), time.monotonic() + 240
        while len(rows("killed")) < least and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert least <= len(rows("killed")) < len(rows("whole"))
    assert begin("killed").wait(240) == 0
    assert written(tiny / "killed") == written(tiny / "whole")
