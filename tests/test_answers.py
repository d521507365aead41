"""Answers of the prompted teacher: they are its own, kept in a file, and sampled once however often it is stopped."""

# ruff: noqa: F811

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from test_build import config, directory, exported  # noqa: F401
from test_context import RULES, made  # noqa: F401

from kdjax.answers import ANSWERS, PROGRESS, answered, write_answers
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.models import Model, open_model
from kdjax.sampling import AnswersConfig, Sampling

home = tiny_run.home
SAMPLED = AnswersConfig(by="teacher", count=10, tokens=6, sampling=Sampling(0.7), batch_size=4)


@pytest.fixture
def asked(made, tmp_path):
    """A run whose rows have no answers; the prompts `0` to `119`."""
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"prompt": str(n), "more": n}) for n in range(120)))
    return replace(made, answers=SAMPLED, data=replace(made.data, sources=(f"jsonl:{tmp_path / 'asked.jsonl'}",)))


def read(directory):
    return [json.loads(line) for line in (directory / ANSWERS).read_text().splitlines()]


def test_they_are_what_the_teacher_says_behind_its_prompt(asked, tmp_path):
    write_answers(asked, tmp_path)
    rows, tokenizer = read(tmp_path), byte_tokenizer()
    assert len(rows) == len({row["prompt"] for row in rows}) == 10
    file = open_model(asked.teacher.source)
    model, params = Model(file.config), jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), file.tensors)
    for first in (0, 4, 8):
        some = rows[first : first + 4]
        prompts = [tokenizer.encode(f"{RULES}{row['prompt']}: ") for row in some]
        how = {"max_new_tokens": 6, "sampling": Sampling(0.7), "seed": 0, "eos_ids": tokenizer.eos_ids}
        said = generate(model, params, prompts, first=first, **how)
        assert [row["answer"] for row in some] == [tokenizer.decode(ids).rstrip() for ids in said]
        assert all(row["more"] == int(row["prompt"]) for row in some)


@pytest.mark.slow
def test_an_answer_ends_before_a_stop(asked, tmp_path):
    write_answers(asked, tmp_path)
    whole = {row["prompt"]: row["answer"] for row in read(tmp_path)}
    (end, *_) = [text[2] for text in whole.values() if len(text) > 2]
    (tmp_path / "cut").mkdir()
    write_answers(replace(asked, answers=replace(asked.answers, stop=(end,))), tmp_path / "cut")
    cut = {prompt: text.partition(end)[0] for prompt, text in whole.items()}
    assert {row["prompt"]: row["answer"] for row in read(tmp_path / "cut")} == {
        prompt: text for prompt, text in cut.items() if text.strip()
    }
    assert cut != whole


def test_only_answers_that_are_wanted_are_kept(asked, tmp_path):
    write_answers(asked, tmp_path)
    whole = [row["answer"] for row in read(tmp_path)]
    (tmp_path / "some").mkdir()
    letter = whole[0][0]
    write_answers(replace(asked, answers=replace(asked.answers, only=f"^{re.escape(letter)}")), tmp_path / "some")
    wanted = [text for text in whole if text[0] == letter]
    assert [row["answer"] for row in read(tmp_path / "some")] == wanted and 0 < len(wanted) < len(whole)
    told = json.loads((tmp_path / "some" / PROGRESS).read_text())
    assert told["dropped"] == {"without what answers.only asks for": len(whole) - len(wanted)}


@pytest.mark.slow
def test_sampling_that_was_stopped_goes_on_to_the_same_file(asked, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    write_answers(asked, tmp_path / "whole")
    whole = (tmp_path / "whole" / ANSWERS).read_bytes()
    progress = json.loads((tmp_path / "whole" / PROGRESS).read_text())
    lines = whole.splitlines(keepends=True)
    stopped = progress | {"done": 4, "bytes": len(b"".join(lines[:4]))}
    (tmp_path / "parts" / PROGRESS).write_text(json.dumps(stopped))
    (tmp_path / "parts" / ANSWERS).write_bytes(b"".join(lines[:5]) + b'{"torn')
    write_answers(asked, tmp_path / "parts")
    assert (tmp_path / "parts" / ANSWERS).read_bytes() == whole


def test_what_a_person_has_edited_is_what_is_trained_on(asked, tmp_path):
    write_answers(asked, tmp_path)
    rows = [{**row, "answer": "mine"} for row in read(tmp_path)]
    (tmp_path / ANSWERS).write_text("\n".join(map(json.dumps, rows)))
    text = answered(asked, tmp_path)
    assert text.sources == (f"jsonl:{tmp_path / ANSWERS}",) and {row["answer"] for row in read(tmp_path)} == {"mine"}
    assert answered(replace(asked, answers=AnswersConfig()), tmp_path) == asked.data


def test_answers_that_came_about_otherwise_are_not_touched(asked, tmp_path):
    write_answers(asked, tmp_path)
    before = (tmp_path / ANSWERS).read_bytes()
    with pytest.raises(UserError, match="was sampled otherwise .answers.tokens: 6 -> 5.; choose another --run-dir"):
        write_answers(replace(asked, answers=replace(SAMPLED, tokens=5)), tmp_path)
    (tmp_path / PROGRESS).write_text("{")
    with pytest.raises(UserError, match="answers.json is damaged"):
        write_answers(asked, tmp_path)
    (tmp_path / PROGRESS).unlink()
    with pytest.raises(UserError, match="is there without answers.json"):
        write_answers(asked, tmp_path)
    assert (tmp_path / ANSWERS).read_bytes() == before


def test_thoughts_become_a_column_of_the_teachers_view(asked, tmp_path):
    asked = replace(asked, answers=replace(SAMPLED, count=60, tokens=24, scratchpad="e", batch_size=60))
    write_answers(asked, tmp_path)
    rows, progress = read(tmp_path), json.loads((tmp_path / PROGRESS).read_text())
    assert rows and len(rows) + progress["dropped"]["without an answer"] == 60
    for row in rows:
        assert row["scratchpad"].rstrip().endswith("e") and row["scratchpad"].count("e") == 1
        assert row["answer"] and not row["answer"].startswith(" ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 300}, "prompt 0 has .* tokens and 300 new ones were asked for|more than data.sequence_length"),
        ({"tokens": 30}, "asked.jsonl line .*with an answer of 30 is more than data.sequence_length 32"),
    ],
)
def test_what_cannot_fit_is_said_before_the_first_answer(asked, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        write_answers(replace(asked, answers=replace(SAMPLED, **change)), tmp_path)
    assert not (tmp_path / ANSWERS).exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": -1}, "answers.count is -1; wanted at least 0"),
        ({"student_share": 1.5}, "answers.student_share is 1.5; wanted from 0 to 1"),
        ({"behaviour": "("}, "is no regular expression"),
        ({"sampling": Sampling(top_p=2)}, "top_p is 2"),
    ],
)
def test_bad_settings_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        replace(SAMPLED, **change)


def test_a_config_without_a_teacher_cannot_have_its_answers(asked):
    with pytest.raises(UserError, match="answers.by is 'teacher' but the config has no teacher"):
        replace(asked, teacher=None, student=replace(asked.student, source=asked.teacher.source))
