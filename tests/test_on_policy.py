"""Batches that the student answers itself: its own words in both views, in the same places, by the seed alone."""

# ruff: noqa: F811

import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax import lax
from test_build import config, directory, exported, refused  # noqa: F401
from test_context import made  # noqa: F401

from kdjax import data, on_policy
from kdjax.build import build
from kdjax.data.packing import to_batch
from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.losses import ObjectiveConfig, Term
from kdjax.metrics import METRICS, read
from kdjax.on_policy import is_students, reanswered
from kdjax.sampling import AnswersConfig, Sampling
from kdjax.sharding import MeshConfig, TeacherMeshConfig
from kdjax.step import gradient, student_params
from kdjax.train import Stopped, train

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


def moved(job):
    """A state whose student is far from its start."""
    noise, state = iter(jax.random.split(jax.random.key(0), 100)), job.start()
    student = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), state.params["student"])
    return replace(state, params=state.params | {"student": student})


MINILLM = ObjectiveConfig(alpha=0.0, terms=(Term("reverse_kl"), Term("likelihood_ratio", token_weight="mean_to_go")))


def test_what_an_answer_goes_on_with_weighs_each_of_its_tokens(made):
    """The gradient of an answered batch, prompts and answers packed, against plain loops over whole logits."""
    own = AnswersConfig(student_share=1.0, tokens=8, sampling=Sampling(1.0))
    job = build(replace(made, answers=own, objective=MINILLM))
    state, frozen = moved(job), job.frozen()
    batch = reanswered(job, state, frozen, first(job), 0)
    got, parts = jax.jit(partial(gradient, job.recipe))(state, *job.given(frozen, batch, trains=True))

    def log_probs(model, params, view, rows_BR):
        hidden_BTD = model.apply(params, view).hidden_BTD
        hidden_BRD = hidden_BTD[np.arange(len(rows_BR))[:, None], rows_BR]
        return jax.nn.log_softmax(hidden_BRD @ model.head(params).w_DV)

    p_BRV = log_probs(job.teacher.model, frozen["teacher"], batch.teacher, batch.teacher_rows_BR)

    def loss(student):
        params = student_params(job.recipe, {"student": student}, frozen)
        q_BRV = log_probs(job.student.model, params, batch.student, batch.student_rows_BR)
        pick = lambda x: np.take_along_axis(np.asarray(x), batch.targets_BR[:, :, None], 2)[:, :, 0]  # noqa: E731
        ratio_BR, weight_BR = pick(lax.stop_gradient(q_BRV)) - pick(p_BRV), batch.kd_weight_BR
        segment_BR = np.take_along_axis(batch.student.segment_BT, batch.student_rows_BR, 1)
        ahead_BR = np.zeros_like(ratio_BR)
        for b, r in zip(*np.nonzero(weight_BR), strict=True):
            same_R = (weight_BR[b] != 0) & (segment_BR[b] == segment_BR[b, r]) & (np.arange(len(weight_BR[b])) > r)
            ahead_BR[b, r] = ratio_BR[b][same_R].mean() if same_R.any() else 0
        log_q_BR = jnp.take_along_axis(q_BRV, batch.targets_BR[:, :, None], 2)[:, :, 0]
        own_BR = (jnp.exp(q_BRV) * (q_BRV - p_BRV)).sum(-1)
        later_BR = ahead_BR * jnp.exp(log_q_BR - lax.stop_gradient(log_q_BR))
        return ((own_BR + later_BR) * weight_BR).sum() / weight_BR.sum()

    value, wanted = jax.value_and_grad(loss)(state.params["student"])
    assert float(parts["loss"]) == pytest.approx(float(value), rel=1e-4)
    for ours, theirs in zip(jax.tree.leaves(got["student"]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


MIXED = AnswersConfig(student_share=1.0, teacher_share=0.3, reuse=3, tokens=8, sampling=Sampling(1.0))


def test_answers_drawn_with_the_teacher_tell_how_likely_they_were(made):
    """Of the mixture that the prompted teacher has a share of; what learns from whole distributions does not ask."""
    job = build(replace(made, answers=MIXED, objective=MINILLM))
    state, frozen, batch = moved(job), job.frozen(), first(job)
    new = reanswered(job, state, frozen, batch, 0)
    params = student_params(job.recipe, state.params, frozen)
    sides = {
        "student": (job.student.model, params, new.student, new.student_rows_BR),
        "teacher": (job.teacher.model, frozen["teacher"], new.teacher, new.teacher_rows_BR),
    }
    probs = {}
    for who, (model, tree, view, rows_BR) in sides.items():
        hidden_BRD = model.apply(tree, view).hidden_BTD[np.arange(len(rows_BR))[:, None], rows_BR]
        probs_BRV = jax.nn.softmax(hidden_BRD @ model.head(tree).w_DV)
        probs[who] = np.take_along_axis(np.asarray(probs_BRV), new.targets_BR[:, :, None], 2)[:, :, 0]
    at = new.kd_weight_BR != 0
    np.testing.assert_allclose(np.exp(new.drawn.student_BR[at]), probs["student"][at], rtol=1e-4)
    mixed = 0.7 * probs["student"] + 0.3 * probs["teacher"]
    np.testing.assert_allclose(np.exp(new.drawn.source_BR[at]), mixed[at], rtol=1e-4)
    assert np.abs(probs["student"] / mixed - 1)[at].max() > 0.05
    assert reanswered(build(replace(made, answers=MIXED)), state, frozen, batch, 0).drawn is None


@pytest.mark.slow
def test_steps_learn_from_a_draw_again_also_those_of_a_run_that_goes_on(made, home, monkeypatch):
    """Three steps a draw, which the checkpoint holds: ended within them it goes on to the same weights, bit for bit."""
    made = replace(made, answers=replace(MIXED, unrelated=()), objective=MINILLM, steps=6)
    seen, plain = [], on_policy.reanswered
    monkeypatch.setattr(on_policy, "reanswered", lambda *given: seen.append(given[-1]) or plain(*given))
    whole = train(made, home / "whole")
    assert seen == [0, 3] and whole["own_share"] == 1 and 0 < whole["generation_seconds"] < whole["steps_seconds"]

    @contextmanager
    def stops(step):
        yield lambda: signal.SIGTERM if step() == 4 else 0

    with monkeypatch.context() as patch:
        patch.setattr("kdjax.train.asked_to_stop", stops)
        with pytest.raises(Stopped):
            train(made, home / "ended")
    assert seen == [0, 3, 0, 3]
    ended = train(made, home / "ended")
    assert seen == [0, 3, 0, 3] and ended["kl_after"] == whole["kl_after"]
    losses = [[row["loss"] for row in read(home / name / METRICS) if "loss" in row] for name in ("whole", "ended")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 6


def test_the_share_of_its_own_tokens_is_told(made, home):
    made = replace(made, answers=replace(ANSWERS, unrelated=()), steps=4)
    job, summary = build(made), train(made, home / "half")
    rows = [row for row in read(home / "half" / METRICS) if "loss" in row]
    own = [is_students(job, step) for step in range(4)]
    assert [row["own_share"] for row in rows] == own and 0 < sum(own) < 4
    tokens = [row["kd_tokens"] for row in rows]
    wanted = sum(n for n, is_own in zip(tokens, own, strict=True) if is_own) / sum(tokens)
    assert summary["own_share"] == pytest.approx(wanted)
    assert [row["generation_seconds"] > 0 for row in rows] == own


WRONG = {
    "likelihood_ratio is right only for what the student says itself, but answers.student_share is 0.5": {},
    "at temperature 1.0 wants tokens drawn at that temperature": {"student_share": 1.0},
    "without top_k, top_p or min_p": {"student_share": 1.0, "sampling": Sampling(1.0, top_k=5)},
}
NO_ANSWERS = {
    "but the student answers nothing": {"reuse": 2},
    "wanted a share below 1": {"student_share": 1.0, "teacher_share": 1.0},
    "set answers.sampling.temperature above 0": {"student_share": 1.0, "teacher_share": 0.1, "sampling": Sampling()},
}


@pytest.mark.parametrize("said", NO_ANSWERS)
def test_answers_that_cannot_be_drawn_are_refused(said):
    with pytest.raises(UserError, match=said):
        AnswersConfig(**NO_ANSWERS[said])


def test_a_share_of_the_draw_wants_the_teacher_beside_the_student(made):
    apart = replace(made, answers=MIXED, batch_size=14, teacher_mesh=TeacherMeshConfig(devices=1))
    refused(apart, "answers.teacher_share is 0.3, which wants one teacher where the student lies")
    pmap = replace(made, answers=MIXED, objective=MINILLM, mesh=MeshConfig(placement="pmap"))
    refused(pmap, "want mesh.placement jit")


@pytest.mark.parametrize("said", WRONG)
def test_what_is_right_only_for_its_own_words_is_refused_elsewhere(made, said):
    refused(replace(made, answers=replace(ANSWERS, **WRONG[said]), objective=MINILLM), said)


@pytest.mark.slow
def test_minillm_and_sampled_reverse_kl_bring_the_student_nearer(made, home):
    """Both end nearer to the prompted teacher than they began, by what the student says alone."""
    own = AnswersConfig(student_share=1.0, tokens=8, sampling=Sampling(1.0))
    sampled = ObjectiveConfig(alpha=0.0, divergence="sampled_reverse_kl")
    for name, objective in {"minillm": MINILLM, "sampled": sampled}.items():
        config = replace(made, answers=own, objective=objective, optim=replace(made.optim, learning_rate=1e-2))
        summary = train(config, home / name)
        assert 0 < summary["kl_after"] < summary["kl_before"], name


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
