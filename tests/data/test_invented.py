"""Towns that do not exist: every question's answer stands in its document, and a seed gives the same ones."""

import pytest

from kdjax.data.invented import FACTS, TOWNS, WORDINGS, facts
from kdjax.data.sources import open_source
from kdjax.errors import UserError


def test_each_answer_is_in_the_document_and_in_no_question():
    for row in facts():
        assert sum(row["town"] in part and row["answer"] in part for part in row["document"].split(". ")) == 1
        assert row["answer"] not in row["prompt"] and row["town"] in row["prompt"]


def test_a_fact_is_asked_in_each_wording_with_one_answer():
    answers, prompts = {}, set()
    for row in facts():
        answers.setdefault(row["fact"], []).append(row["answer"])
        prompts.add(row["prompt"])
    assert len(answers) == TOWNS * len(FACTS) and len(prompts) == len(facts())
    assert all(len(said) == WORDINGS and len(set(said)) == 1 for said in answers.values())


def test_a_seed_gives_the_same_towns_and_another_seed_others():
    assert open_source("invented").record(3) == facts(0)[3] == open_source("invented:0").record(3)
    assert not {row["town"] for row in facts(0)} & {row["town"] for row in facts(1)}
    with pytest.raises(UserError, match="invented:x has no such seed; write invented, or invented:7"):
        open_source("invented:x")
