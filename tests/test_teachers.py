"""Several teachers: what they say is mixed by their shares, each speaking to the sources that are its own."""

# ruff: noqa: F811

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from test_build import SMALL, config, refused  # noqa: F401

from kdjax import config as configs
from kdjax.build import build
from kdjax.cli import main
from kdjax.errors import UserError
from kdjax.fields import to_json
from kdjax.losses import ObjectiveConfig
from kdjax.models import Model, ModelSpec
from kdjax.sharding import MeshConfig
from kdjax.step import gradient
from kdjax.teachers import CoTeacher, shares
from kdjax.train import train

OTHER = replace(SMALL, width=24, layers=1, head_width=12)
OBJECTIVE = ObjectiveConfig(alpha=0.3, temperature=2.0)


@pytest.fixture
def several(config, tmp_path):
    """Two sources of different letters; the teacher speaks to both, one co-teacher to the first, one to both."""
    rng = np.random.default_rng(0)
    for name, letters in (("low", "abcdefghij "), ("high", "KLMNOPQRST ")):
        lines = ("".join(rng.choice(list(letters), int(rng.integers(5, 60)))) for _ in range(400))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    text = replace(config.data, sources=tuple(f"text:{tmp_path / name}.txt" for name in ("low", "high")))
    others = CoTeacher(ModelSpec(architecture=OTHER), 2.0, (0,)), CoTeacher(ModelSpec(architecture=SMALL), 0.5)
    return replace(config, data=text, objective=OBJECTIVE, co_teachers=others, prompt="", steps=4)


def first_batch(job):
    return next(job.data.train(None, prefetch=0))[0]


def said(job):
    """The gradient of the first batch, its parts, and the batch."""
    state, frozen, batch = job.start(), job.frozen(), first_batch(job)
    gradients, parts = jax.jit(partial(gradient, job.recipe))(state, *job.given(frozen, batch, trains=True))
    return jax.tree.map(np.asarray, (gradients, parts)), (state, frozen, batch)


def plain_loss(params, job, frozen, batch, shares_NK):
    """The loss of whole logits, in the order of the paper's formulas."""
    rows = np.arange(len(batch.targets_BR))[:, None]

    def log_probs(model, params, temperature):
        hidden_NRD = model.apply(params, batch.student).hidden_BTD[rows, batch.student_rows_BR]
        return jax.nn.log_softmax(hidden_NRD @ model.head(params).w_DV / temperature)

    t, student = OBJECTIVE.temperature, Model(job.student.model.config)
    models = {name: Model(one.model.config) for name, one in job.teachers.items()}
    probs = [np.exp(np.asarray(log_probs(model, frozen[name], t), np.float64)) for name, model in models.items()]
    mixed_BRV = sum(share[..., None] * p for share, p in zip(np.moveaxis(shares_NK, -1, 0), probs, strict=True))
    weight_BR = batch.kd_weight_BR / batch.kd_weight_BR.sum()
    kl_BR = (mixed_BRV * (np.log(mixed_BRV) - log_probs(student, params, t))).sum(-1)
    ce_BR = -(np.eye(264)[batch.targets_BR] * log_probs(student, params, 1.0)).sum(-1)
    return (weight_BR * ((1 - OBJECTIVE.alpha) * t**2 * kl_BR + OBJECTIVE.alpha * ce_BR)).sum()


def test_the_step_is_that_of_the_plain_mixture_each_source_having_its_own_teachers(several):
    job = build(several)
    (gradients, parts), (state, frozen, batch) = said(job)
    wanted_SK = np.array([[1, 2, 0.5], [1, 0, 0.5]]) / [[3.5], [1.5]]
    tokens_BR = np.take_along_axis(batch.student.tokens_BT, batch.student_rows_BR, 1)
    for source, letters in enumerate(("abcdefghij", "KLMNOPQRST")):
        own = tokens_BR[(batch.source_BR == source) & (batch.kd_weight_BR > 0)]
        assert set(job.tokenizer.decode(own.tolist())) - set(" \n") == set(letters)
    params = state.params["student"]
    loss, plain = jax.value_and_grad(plain_loss)(params, job, frozen, batch, wanted_SK[batch.source_BR])
    assert parts["loss"] == pytest.approx(float(loss), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients["student"]), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"placement": "pmap"}, marks=pytest.mark.slow),
        pytest.param({"data": 4, "context": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_trap_4_several_teachers_lie_anywhere(several, mesh, tmp_path):
    """Three steps of training end where those on one axis of devices do."""
    ends = []
    for name, of in (("data", {}), ("other", mesh)):
        got = train(replace(several, mesh=MeshConfig(**of), steps=3), tmp_path / name)
        ends.append([got[figure] for figure in ("kl_before", "kl_after", "ce_after", "perplexity_teacher")])
    assert ends[1] == pytest.approx(ends[0], rel=2e-5)
    assert got["parameters_teacher"] > got["parameters_student"]


def test_without_sources_all_speak_to_all_and_one_is_as_no_other(several):
    """A teacher and itself, mixed, are that teacher; batches then carry no source."""
    alone = build(replace(several, co_teachers=()))
    (_, parts), (state, frozen, batch) = said(alone)
    twice = build(replace(several, co_teachers=(CoTeacher(several.teacher, 3.0),)))
    both = twice.frozen() | {"co_teacher_0": frozen["teacher"]}
    assert batch.source_BR is None and first_batch(twice).source_BR is None
    placed = twice.place.put_batch(batch)
    (_, mixed) = jax.jit(partial(gradient, twice.recipe))(state, both, placed)
    assert float(mixed["loss"]) == pytest.approx(float(parts["loss"]), rel=1e-6)
    drawn = twice.frozen()
    assert not np.array_equal(drawn["teacher"]["embed"]["embedding"], drawn["co_teacher_0"]["embed"]["embedding"])


def test_a_run_goes_on_with_the_same_teachers_and_no_others(several, tmp_path):
    train(replace(several, steps=3), tmp_path / "part")
    saved = configs.load(str(tmp_path / "part"))
    assert saved.co_teachers == several.co_teachers
    other = replace(several.co_teachers[0], model=ModelSpec(architecture=replace(OTHER, layers=2)))
    with pytest.raises(UserError, match="co_teachers"):
        train(replace(saved, co_teachers=(other, several.co_teachers[1])), tmp_path / "part")


@pytest.mark.parametrize(
    ("weights", "sources", "count", "wanted"),
    [
        ((1, 1), ((), ()), 3, [[0.5, 0.5]]),
        ((1, 3), ((), ()), 1, [[0.25, 0.75]]),
        ((1, 3), ((0,), (1,)), 2, [[1, 0], [0, 1]]),
        ((1, 3), ((), (1,)), 2, [[1, 0], [0.25, 0.75]]),
    ],
)
def test_shares(weights, sources, count, wanted):
    np.testing.assert_allclose(shares(weights, sources, count), wanted)


@pytest.mark.parametrize(
    ("weights", "sources", "said"),
    [
        ((1, 0), ((), ()), "weights are 1, 0; wanted each above 0"),
        ((1, float("nan")), ((), ()), "wanted each above 0"),
        ((1, 1), ((0,), (2,)), "sources are .2., but data.sources has 2 entries, counted from 0: leave out 2"),
        ((1, 1), ((0,), (0,)), r"no teacher speaks to the examples of data.sources\[1\]"),
    ],
)
def test_shares_that_cannot_be(weights, sources, said):
    with pytest.raises(UserError, match=said):
        shares(weights, sources, 2)


WRONG = {
    "has no teacher that they stand beside": lambda c: replace(c, teacher=None),
    "which is no model": lambda c: replace(c, co_teachers=(CoTeacher(ModelSpec(source="teacher")),)),
    "teacher_mesh.devices gives one teacher": lambda c: replace(c, teacher_mesh=replace(c.teacher_mesh, devices=4)),
    "inner layers of one": lambda c: replace(c, objective=replace(OBJECTIVE, features=({"kind": "hidden_mse"},))),
    "is what one teacher sees": lambda c: replace(
        c, data=replace(c.data, teacher_view="{{ prompt }}", packing="first_fit")
    ),
    "a cache is of one teacher": lambda c: replace(c, cache="somewhere"),
    "has one teacher answer": lambda c: replace(c, answers=replace(c.answers, by="teacher")),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_several_teachers_cannot_do_is_refused(several, said):
    with pytest.raises(UserError, match=f"co_teachers has ., but .*{said}"):
        WRONG[said](several)


def test_another_vocabulary_is_refused_and_so_are_labels_and_plans(several, tmp_path, capsys):
    odd = CoTeacher(ModelSpec(architecture=replace(SMALL, vocab_size=300)))
    refused(replace(several, co_teachers=(odd,)), "student's vocabulary has 264 but the teacher's 300 entries")
    refused(replace(several, teacher_sources=(5,)), "a teacher's sources are .5., but data.sources has 2")
    recipe = tmp_path / "config.json"
    recipe.write_text(to_json(several))
    assert main(["label", str(recipe), str(tmp_path / "cache")]) == 2
    assert "a cache is of one teacher" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--topology", "cpu:8"]) == 2
    assert "a plan is of one teacher" in capsys.readouterr().err
