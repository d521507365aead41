"""From an empty directory to a distilled prompt: each stage's file is what the next one starts from."""

import json
import re
from dataclasses import replace

import pytest
import tiny_search

from kdjax import pipeline as job
from kdjax import search
from kdjax.cli import main
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.errors import UserError
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.models.config import Lora
from kdjax.pipeline import PipelineConfig, pipeline
from kdjax.prompts.config import SpeakerConfig
from kdjax.prompts.splits import read_examples, split_as
from kdjax.prompts.tasks import TASKS, Candidate, template
from kdjax.sampling import AnswersConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    found = tiny_search.write(tmp_path_factory.mktemp("pipeline"))
    distil = Config(
        teacher=ModelSpec(source=found.scorer.source),
        student=ModelSpec(source="teacher", lora=Lora(rank=2)),
        data=DataConfig(packing="first_fit", sequence_length=64, eval_fraction=0.3, eval_tokens=256),
        answers=AnswersConfig(by="teacher", count=40, tokens=2, unrelated=()),
        objective=ObjectiveConfig(alpha=0.0),
        steps=2,
        batch_size=8,
    )
    return PipelineConfig(search=found, distil=distil)


EDITED = "Edited by a person, who has left nothing of it."


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pipeline_wants_a_search_for_a_local_model(config):
    with pytest.raises(UserError, match="search.make is 'magpie'"):
        replace(config, search=replace(config.search, make="magpie", proposer=config.search.scorer))
    with pytest.raises(UserError, match="search.scorer is a server"):
        replace(
            config,
            search=replace(
                config.search, task="generation", labels=(), scorer=SpeakerConfig("http://localhost:1/v1", model="m")
            ),
        )


@pytest.mark.slow
def test_each_stage_starts_from_the_file_of_the_one_before(config, tmp_path, monkeypatch, capsys):
    def stopped(*arguments):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    for stage in ("search", "train", "_tested"):  # killed in each stage once
        with monkeypatch.context() as patched:
            patched.setattr(job, stage, stopped)
            with pytest.raises(KeyboardInterrupt):
                pipeline(config, run)
        if stage == "train":
            best = run / "search" / "best.txt"
            best.write_text(best.read_text().replace(tiny_search.PLANTED, EDITED))
            short = replace(config.distil, data=replace(config.distil.data, sequence_length=4))
            with pytest.raises(UserError, match=r"data.sequence_length 4"):  # mended below, and nothing lost
                pipeline(replace(config, distil=short), run)
    before = {path: path.read_bytes() for path in run.rglob("*.jsonl") if path.name != "metrics.jsonl"}
    found = pipeline(config, run)
    after = {path: path.read_bytes() for path in before}
    assert after == before
    own = replace(config.search, sources=(f"jsonl:{run / 'examples.jsonl'}",), **PLAIN)
    splits = split_as(own, read_examples(own.sources, own.input, own.answer))
    asked = {row["prompt"] for row in lines(run / "questions.jsonl")}
    assert len(splits.test) == 40 and asked.isdisjoint({one.input for one in splits.test}) and len(asked) > 60
    answered = lines(run / "distil" / "answers.jsonl")
    assert len(answered) > 30 and {row["prompt"] for row in answered} <= asked
    saved = json.loads((run / "distil" / "config.json").read_text())
    assert saved["data"]["teacher_view"] == best.read_text() and EDITED in found["prompt"]
    assert "Edited" not in saved["data"]["student_view"]
    scored = [row["candidate"] for row in lines(run / "evaluations.jsonl") if row["part"] == "prompted"]
    assert set(scored) == {Candidate(EDITED).id} and len(scored) == 40
    test, gain = found["test"], found["gains"]["prompted"]
    assert found["search"]["test"]["best"]["score"] == 1 > test["prompted"]["score"] != test["unprompted"]["score"]
    assert gain["score"] == pytest.approx(test["prompted"]["score"] - test["unprompted"]["score"])
    assert found["gains"].keys() == {"prompted", "distilled"} and "recovered" in found["distil"]
    (tmp_path / "recipe.py").write_text("def get_config():\n    from kdjax.config import Config\n    return Config()\n")
    capsys.readouterr()
    assert main(["pipeline", str(run)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"with the prompt +\d\.\d+ .* [+-]\d\.\d+ ", said) and "distilled, without it" in said
    assert main(["pipeline", str(run), "--search.rounds", "3"]) == 2
    assert "holds a job whose config differs (search.rounds: 2 -> 3)" in capsys.readouterr().err
    assert main(["pipeline", str(run), "--distil.steps", "3"]) == 2
    assert "steps: 2 -> 3" in capsys.readouterr().err
    assert main(["pipeline", str(tmp_path / "recipe.py")]) == 2


WRONG = {
    "Label:\n": ("", "does not end with 'Text: "),
    "Text: {{ prompt }}": ("Text: {{ prompt.upper() }}", "does not end with 'Text: "),
    tiny_search.PLANTED: ("Say which {{ kind }} it is.", "has '{{ kind }} it is."),
}
"""What a person takes out of best.txt -> what is put there, and what is said."""


@pytest.mark.parametrize("taken", WRONG)
def test_a_prompt_edited_beyond_use_is_refused(config, tmp_path, taken):
    put, said = WRONG[taken]
    own = replace(config.search, **PLAIN)
    path, best = tmp_path / "best.txt", Candidate(tiny_search.PLANTED + ' Not {"a": {{}}.')
    path.write_text(view := template(TASKS[own.task], best, own.input, chat=False))
    assert search.read_best(path, own) == best and view.count(taken) == 1
    path.write_text(view.replace(taken, put))
    with pytest.raises(UserError, match=re.escape(said)):
        search.read_best(path, own)


PLAIN = {"input": "{{ prompt }}", "answer": "{{ answer }}"}


@pytest.mark.slow
def test_a_search_that_was_killed_is_gone_on_with(config, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(search, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            pipeline(config, tmp_path / "run")
    paid = lines(tmp_path / "run" / "search" / "evaluations.jsonl")
    monkeypatch.setattr(job, "train", lambda config, directory: stopped())
    with pytest.raises(KeyboardInterrupt):
        pipeline(config, tmp_path / "run")
    assert lines(tmp_path / "run" / "search" / "evaluations.jsonl")[: len(paid)] == paid
