"""Batches that the student answers itself: its own words in both views, in the same places, by the seed alone."""

# ruff: noqa: F811

from dataclasses import replace

import numpy as np
import pytest
import tiny_run
from test_build import config, directory, exported, refused  # noqa: F401
from test_context import made  # noqa: F401

from kdjax import data
from kdjax.build import build
from kdjax.data.packing import to_batch
from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.on_policy import is_students, reanswered
from kdjax.sampling import AnswersConfig, Sampling
from kdjax.step import student_params
from kdjax.train import train

home = tiny_run.home
ANSWERS = AnswersConfig(student_share=0.5, tokens=8, sampling=Sampling(0.7))


@pytest.fixture
def job(made):
    return build(replace(made, answers=ANSWERS))


def first(job):
    return next(job.data.train(prefetch=0))[0]


def test_a_batch_goes_back_to_its_rows(job):
    batch = first(job)
    again = to_batch(data.rows_of(batch))
    for name in ("student", "teacher"):
        for field in ("tokens_BT", "segment_BT", "position_BT"):
            np.testing.assert_array_equal(getattr(getattr(again, name), field), getattr(getattr(batch, name), field))
    for field in ("targets_BR", "kd_weight_BR", "ce_weight_BR", "student_rows_BR", "teacher_rows_BR"):
        np.testing.assert_array_equal(getattr(again, field), getattr(batch, field))


def test_the_students_own_answers_stand_in_both_views(job):
    batch, state, frozen = first(job), job.start(), job.frozen()
    new = reanswered(job, state, frozen, batch, 3)
    old, own = (data.examples_of(data.rows_of(one)) for one in (batch, new))
    assert [(one.student, one.teacher) for one in own] == [(one.student, one.teacher) for one in old]
    params = student_params(job.recipe, state.params, frozen)
    seed = int(np.random.SeedSequence([0, 3]).generate_state(1)[0] >> 1)
    how = {"max_new_tokens": 8, "sampling": Sampling(0.7), "seed": seed, "eos_ids": job.tokenizer.eos_ids}
    assert [one.answer for one in own] == generate(job.student.model, params, [one.student for one in old], **how)
    assert [one.answer for one in own] != [one.answer for one in old]
    for b in range(len(new.targets_BR)):
        at = new.kd_weight_BR[b] != 0
        for view, rows_BR in ((new.student, new.student_rows_BR), (new.teacher, new.teacher_rows_BR)):
            np.testing.assert_array_equal(view.tokens_BT[b][rows_BR[b][at] + 1], new.targets_BR[b][at])
    assert new.kd_weight_BR.sum() == sum(len(one.answer) for one in own) and new.ce_weight_BR.sum() == 0
    again, other = (reanswered(job, state, frozen, batch, step).targets_BR for step in (3, 4))
    np.testing.assert_array_equal(again, new.targets_BR)
    assert (other != again).any()


def test_the_student_answers_its_share_of_the_batches(job):
    chosen = [is_students(job, step) for step in range(1000)]
    assert 440 < sum(chosen) < 560 and chosen == [is_students(job, step) for step in range(1000)]
    for share in (0, 1):
        own = replace(job, config=replace(job.config, answers=replace(ANSWERS, student_share=share)))
        assert {is_students(own, step) for step in range(50)} == {bool(share)}


def test_an_answer_without_room_is_refused(job):
    rows = data.rows_of(first(job))
    count = len(data.examples_of(rows))
    with pytest.raises(UserError, match="an answer of 40 tokens was given, but its row has room for"):
        data.reanswered(rows, [[1] * 40] * count)


def test_it_wants_prompts(made):
    no_views = replace(made.data, student_view="", teacher_view="", teacher_length=0)
    refused(replace(made, answers=ANSWERS, data=no_views), "answers.student_share wants prompts")


@pytest.mark.slow
def test_it_learns_from_its_own_answers(made, home):
    made = replace(made, objective=replace(made.objective, alpha=0.0), optim=replace(made.optim, learning_rate=1e-2))
    made = replace(made, answers=replace(ANSWERS, student_share=1.0, unrelated=()), steps=30)
    summary = train(made, home / "own")
    assert 0 < summary["kl_after"] < 0.8 * summary["kl_before"]
    assert train(replace(made, steps=30), home / "again")["kl_after"] == summary["kl_after"]
