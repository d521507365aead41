"""What of a prompt's effect is recovered: against float64, with an interval, and never by itself."""

# ruff: noqa: F811

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from test_build import config, directory, exported, refused  # noqa: F401
from test_context import log_probs, made  # noqa: F401

from kdjax import data
from kdjax.build import build
from kdjax.models import Model, open_model
from kdjax.models.paths import nested, parameter_paths
from kdjax.recovery import recovery, shares
from kdjax.sampling import AnswersConfig, Sampling
from kdjax.step import student_params
from kdjax.train import train

home = tiny_run.home
ANSWERS = AnswersConfig(tokens=6, sampling=Sampling(0.7), batch_size=16, behaviour="a", unrelated=())


@pytest.fixture
def job(made):
    return build(replace(made, answers=ANSWERS, data=replace(made.data, eval_tokens=64)))


def exact(model, params, tree, example, shared):
    """Σ KL(prompted ‖ model without the prompt) of one answer, in float64; `shared` begins each of the teacher's."""
    count = len(example.answer)
    p = log_probs(model, params, [*shared, *example.teacher, *example.answer])[-count - 1 : -1]
    q = log_probs(model, tree, example.student + example.answer)[-count - 1 : -1]
    return (np.exp(p) * (p - q)).sum()


def test_it_is_one_minus_the_ratio_of_both_divergences_in_float64(job):
    state, frozen = job.start(), job.frozen()
    key = iter(jax.random.split(jax.random.key(3), 100))
    params = {  # adapters that do something
        path: x + 0.003 * jax.random.normal(next(key), x.shape) for path, x in parameter_paths(state.params).items()
    }
    found = recovery(job, nested(params), frozen)
    file = open_model(job.config.teacher.source)
    model, whole = Model(file.config), jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), file.tensors)
    student, held = student_params(job.recipe, nested(params), frozen), data.examples_of(job.data.held_out)
    plain, distilled = (
        sum(exact(model, whole, tree, one, job.data.shared) for one in held) for tree in (whole, student)
    )
    assert found["recovered"] == pytest.approx(1 - distilled / plain, abs=2e-3)
    assert found["recovered"] < 0.5 and found["recovered_prompts"] == len(held) > 3
    low, high = found["recovered_interval"]
    assert low < found["recovered"] < high
    assert set(found["behaviour"]) == {"prompted", "unprompted", "distilled"} and not found["forgetting"]
    tokenizer, texts = job.tokenizer, [one.answer for one in held]
    assert found["behaviour"]["prompted"] == pytest.approx(np.mean(["a" in tokenizer.decode(t) for t in texts]))


@pytest.mark.slow
def test_a_student_that_is_the_teacher_without_its_prompt_has_recovered_nothing(job):
    found = recovery(job, job.start().params, job.frozen())
    assert found["recovered"] == pytest.approx(0, abs=1e-5) and found["recovered_own"] == pytest.approx(0, abs=1e-5)
    assert found["recovered_interval"] == pytest.approx((0, 0), abs=1e-5)
    tokens = [len(job.data.shared) + len(one.teacher) - len(one.student) for one in data.examples_of(job.data.held_out)]
    assert found["saved"]["prompt_tokens"] == np.mean(tokens) == len("Always shout. ")
    assert found["saved"]["cache_bytes"] == np.mean(tokens) * 2 * 2 * 1 * 8 * 4


def test_forgetting_is_measured_on_plain_text(made):
    rows = replace(made, answers=replace(ANSWERS, unrelated=made.data.sources))
    refused(rows, "answers.unrelated names jsonl:.* of kind answer; wanted plain text")


def test_without_a_prompt_of_the_teachers_own_there_is_nothing_to_recover(made):
    job = build(replace(made, data=replace(made.data, teacher_view="", teacher_length=0)))
    assert recovery(job, job.start().params, job.frozen()) == {}


def test_the_interval_covers_the_share_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for trial in range(200):
        plain_P = rng.gamma(2.0, 1.0, 60)
        distilled_P = plain_P * rng.uniform(0, 0.4, 60)  # of all prompts: 0.8
        share, (low, high) = shares(distilled_P, plain_P, seed=trial)
        assert share == pytest.approx(1 - distilled_P.sum() / plain_P.sum())
        inside += low <= 0.8 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_a_student_that_was_made_worse_is_below_zero():
    assert shares(np.array([3.0, 3.0]), np.array([1.0, 1.0]))[0] == -2


@pytest.mark.slow
def test_a_run_ends_with_what_it_recovered(made, home, tmp_path):
    made = replace(made, objective=replace(made.objective, alpha=0.0), optim=replace(made.optim, learning_rate=1e-2))
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} has nothing to do with letters. " * 9 for n in range(99)))
    answers = replace(ANSWERS, by="teacher", count=100, unrelated=(f"text:{tmp_path / 'text.txt'}",))
    rows = replace(made, answers=answers, prompt="7", steps=40)
    summary = train(rows, home / "recovered")
    assert 0.2 < summary["recovered"] < 1 and summary["forgetting"]["kl"] > 0
    assert list(summary["continuations"]) == ["without the prompt", "with the prompt", "distilled, without it"]


@pytest.mark.slow
def test_a_student_of_an_unrelated_prompt_recovers_about_nothing(made, home, tmp_path):
    """The control: taught behind another prompt of equal length, measured against the first."""
    made = replace(made, objective=replace(made.objective, alpha=0.0), optim=replace(made.optim, learning_rate=1e-2))
    made = replace(made, answers=replace(ANSWERS, by="teacher", count=100), steps=40)
    other = replace(made.data, teacher_view="zq]'9 x;%4=wv {{ prompt }}: ")
    shares_of = {}
    for name, view in (("own", made.data), ("other", other)):
        train(replace(made, data=view), home / name)
        file = open_model(str(home / name))
        student = jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), file.tensors)
        job = build(made)
        teacher = open_model(made.teacher.source)
        whole = jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), teacher.tensors)
        model, held = Model(teacher.config), data.examples_of(job.data.held_out)
        plain, distilled = (
            sum(exact(model, whole, tree, one, job.data.shared) for one in held) for tree in (whole, student)
        )
        shares_of[name] = 1 - distilled / plain
    assert shares_of["other"] < 0.5 * shares_of["own"]
