"""Losses of inner layers against float64 numpy, value and gradient; what does not count, and what a config may ask."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import home, rows  # noqa: F401 (home is a fixture)

from kdjax import config as configs
from kdjax.build import build
from kdjax.checkpoint import Checkpoints
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.fields import differences, from_json, to_json
from kdjax.losses import FEATURES, Feature, ObjectiveConfig
from kdjax.losses.features import (
    Sizes,
    feature_sum,
    init_projections,
    named,
    projections,
    resolved,
    tapped,
)
from kdjax.models import ModelSpec, open_model
from kdjax.models.paths import parameter_paths
from kdjax.train import train

N, D, E = 7, 5, 4
B, T, HEADS = 2, 6, 2
BY_ROWS = [kind for kind, row in FEATURES.items() if row.by_rows]
RELATIONS = [kind for kind in FEATURES if kind.startswith("relation")]
SEGMENTS = np.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)


def mse_oracle(student, teacher, weight):
    return np.sum(weight * np.mean((student - teacher) ** 2, -1))


def unit_oracle(x):
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def cosine_oracle(student, teacher, weight):
    return np.sum(weight * (1 - np.sum(unit_oracle(student) * unit_oracle(teacher), -1)))


def contrastive_oracle(student, teacher, weight, temperature=0.3):
    counts = weight > 0
    logits = unit_oracle(student[counts]) @ unit_oracle(teacher[counts]).T / temperature
    return sum(
        w * (np.log(np.exp(row).sum()) - row[n]) for n, (w, row) in enumerate(zip(weight[counts], logits, strict=True))
    )


def relation_oracle(student, teacher, weight, segments=SEGMENTS):
    """One token, one head, one visible key after the other."""
    total = 0.0
    for b, t in np.argwhere(weight > 0):
        keys = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        for head in range(HEADS):
            rows = []
            for x in (student, teacher):
                width = x.shape[-1] // HEADS
                x_TK = x[b, :, head * width : (head + 1) * width]
                exp = np.exp([x_TK[t] @ x_TK[s] / np.sqrt(width) for s in keys])
                rows.append(exp / exp.sum())
            q, p = rows
            total += weight[b, t] * np.sum(p * np.log(p / q)) / HEADS
    return total


def pooled_oracle(student, teacher, weight, segments=SEGMENTS):
    """One token after the other: the cosine of the means of its text."""
    total = 0.0
    for b, t in np.argwhere(weight > 0):
        means = [x[b][segments[b] == segments[b, t]].mean(0) for x in (student, teacher)]
        norms = np.linalg.norm(means[0]) * np.linalg.norm(means[1])
        cosine = means[0] @ means[1] / norms if norms else 0.0
        total += weight[b, t] * (1 - cosine)
    return total


ORACLES = {
    "pooled_cosine": pooled_oracle,
    "hidden_mse": mse_oracle,
    "hidden_cosine": cosine_oracle,
    "contrastive": contrastive_oracle,
    **dict.fromkeys(RELATIONS, relation_oracle),
}


def problem(kind, seed=0):
    """Return student, teacher, segments, weights and a projection (None where the kind has none), in float64."""
    rng = np.random.default_rng(seed)
    if kind == "pooled_cosine":
        student, teacher = rng.standard_normal((B, T, D)), rng.standard_normal((B, T, D))
        return student, teacher, SEGMENTS, (SEGMENTS > 0) * rng.uniform(0.5, 1, (B, T)), None
    if kind in RELATIONS:
        student, teacher = rng.standard_normal((B, T, 2 * HEADS)), rng.standard_normal((B, T, 3 * HEADS))
        return student, teacher, SEGMENTS, (SEGMENTS > 0) * rng.uniform(0.5, 1, (B, T)), None
    weight = rng.uniform(0.5, 1, N) * np.asarray([1, 1, 0, 1, 0, 1, 1])
    student, teacher, kernel = rng.standard_normal((N, D)), rng.standard_normal((N, E)), rng.standard_normal((D, E))
    return student, teacher, (weight > 0).astype(np.int32), weight, kernel


def feature_of(kind):
    return Feature(kind, temperature=0.3, relation_heads=HEADS)


def computed(kind, student, teacher, segment, weight, kernel, dtype=jnp.float32):
    """Return the sum and its gradients with respect to student and projection."""
    arrays = [jnp.asarray(x, dtype) for x in (student, teacher)]
    kernel = None if kernel is None else jnp.asarray(kernel, jnp.float32)

    def loss(student, kernel):
        return feature_sum(feature_of(kind), student, arrays[1], segment, jnp.asarray(weight, jnp.float32), kernel)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(arrays[0], kernel)


def slope(function, x, step=1e-6):
    """Return the gradient by central differences, in float64."""
    found = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        found[index] = (function(up) - function(down)) / (2 * step)
    return found


@pytest.mark.parametrize("kind", FEATURES)
def test_value_and_gradient_are_those_of_float64(kind):
    student, teacher, segment, weight, kernel = problem(kind)

    def oracle(student, kernel):
        return ORACLES[kind](student if kernel is None else student @ kernel, teacher, weight)

    value, (d_student, d_kernel) = computed(kind, student, teacher, segment, weight, kernel)
    assert value == pytest.approx(oracle(student, kernel), rel=1e-5)
    np.testing.assert_allclose(d_student, slope(lambda x: oracle(x, kernel), student), rtol=1e-4, atol=1e-6)
    if kernel is not None:
        np.testing.assert_allclose(d_kernel, slope(lambda x: oracle(student, x), kernel), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", FEATURES)
def test_bf16_inputs_are_compared_in_float32(kind):
    student, teacher, segment, weight, _ = problem(kind)
    student = student[..., : teacher.shape[-1]]
    teacher = teacher[..., : student.shape[-1]]
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (student, teacher)]
    value, _ = computed(kind, student, teacher, segment, weight, None, jnp.bfloat16)
    assert value.dtype == jnp.float32
    assert value == pytest.approx(ORACLES[kind](*rounded, weight), rel=1e-5)


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("filling", [0.0, 3e37, np.nan, None], ids=["zeros", "huge", "nan", "noise"])
def test_trap_15_what_has_no_weight_changes_nothing(kind, filling):
    student, teacher, segment, weight, kernel = problem(kind)
    noise = np.random.default_rng(9).standard_normal
    out = (segment == 0)[..., None]
    others = [np.where(out, noise(x.shape) if filling is None else filling, x) for x in (student, teacher)]
    first = computed(kind, student, teacher, segment, weight, kernel)
    second = computed(kind, *others, segment, weight, kernel)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.asarray(second[1][0])[segment == 0] == 0)


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_trap_15_vectors_of_norm_zero_give_no_nan(kind, who):
    student, teacher, segment, weight, kernel = problem(kind)
    for name, x in (("student", student), ("teacher", teacher)):
        if who in (name, "both"):
            x.reshape(-1, x.shape[-1])[[0, 1]] = 0
    value, gradients = computed(kind, student, teacher, segment, weight, kernel)
    projected = student if kernel is None else student @ kernel
    assert value == pytest.approx(ORACLES[kind](projected, teacher, weight), rel=1e-5)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", sorted(FEATURES.keys() - {"contrastive"}))
def test_a_copy_is_at_zero(kind):
    student, _, segment, weight, _ = problem(kind)
    value, (gradient, _) = computed(kind, student, student, segment, weight, None)
    assert 0 <= value < (0 if kind == "hidden_mse" else 1e-12) + 1e-30
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("kind", FEATURES)
def test_the_teacher_gets_no_gradient(kind):
    student, teacher, segment, weight, kernel = problem(kind)
    of_teacher = jax.grad(lambda x: feature_sum(feature_of(kind), student, x, segment, weight, kernel))
    assert np.all(np.asarray(of_teacher(jnp.asarray(teacher, jnp.float32))) == 0)


def test_all_weights_zero_is_zero():
    for kind in FEATURES:
        student, teacher, segment, weight, kernel = problem(kind)
        value, gradients = computed(kind, student, teacher, 0 * segment, 0 * weight, kernel)
        assert value == 0 and all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(gradients)), kind


def test_relations_of_all_heads_never_exist_at_once():
    heads, tokens = 8, 64
    feature = Feature("relation_qq", relation_heads=heads)
    x = jax.ShapeDtypeStruct((2, tokens, 64), jnp.float32)
    segment = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    weight = jax.ShapeDtypeStruct((2, tokens), jnp.float32)
    module = jax.jit(jax.grad(partial(feature_sum, feature))).lower(x, x, segment, weight).compile().as_text()
    assert f"[2,{tokens},{tokens}]" in module, "those of one head"
    assert f"{heads},2,{tokens},{tokens}]" not in module


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (2, 4, ((0, 1), (1, 3))),
        (2, 3, ((0, 1), (1, 2))),
        (3, 3, ((0, 0), (1, 1), (2, 2))),
        (1, 30, ((0, 29),)),
        (3, 2, ((0, 0), (1, 1), (2, 1))),
    ],
)
def test_layers_are_spread_evenly_last_onto_last(student, teacher, pairs):
    assert resolved(Feature(), Sizes(student, 1, {"hidden": 8}), Sizes(teacher, 1, {"hidden": 8})).layers == pairs


STUDENT = Sizes(2, 2, {"hidden": 32, "q": 32, "k": 16, "v": 16})
TEACHER = Sizes(4, 4, {"hidden": 24, "q": 96, "k": 48, "v": 48})


def test_relation_heads_are_those_that_both_have():
    assert resolved(Feature("relation_kk"), STUDENT, TEACHER).relation_heads == 2
    assert resolved(Feature("relation_kk", relation_heads=16), STUDENT, TEACHER).relation_heads == 16
    with pytest.raises(UserError, match="the teacher's k of width 48 does not cut into 32 relation heads; .* of 16"):
        resolved(Feature("relation_kk", relation_heads=32), STUDENT._replace(widths={"k": 64}), TEACHER)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((2, 0), "'hidden_mse': the student has no layer 2; wanted one from 0 to 1"),
        ((0, 4), "the teacher has no layer 4; wanted one from 0 to 3"),
        ((-1, 3), "the student has no layer -1"),
    ],
)
def test_layers_that_are_not_there_are_named(pair, said):
    with pytest.raises(UserError, match=said):
        resolved(Feature(layers=(pair,)), STUDENT, TEACHER)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "hidden_mes"}, "objective.features 'hidden_mes' is unknown; did you mean 'hidden_mse'"),
        ({"weight": -1.0}, "'hidden_mse': weight is -1.0; wanted 0 or more"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"temperature": 0.0}, "temperature is 0.0; wanted a number above 0"),
        ({"relation_heads": -2}, "relation_heads is -2"),
        ({"layers": ((0, 1, 2),)}, r"layers has \(0, 1, 2\); wanted pairs"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(UserError, match=said) as caught:
        Feature(**fields)
    assert "\n" not in str(caught.value)


def test_projections_stand_where_widths_differ():
    features = [
        Feature("hidden_mse", layers=((0, 1), (1, 3))),
        Feature("contrastive", layers=((1, 3),)),
        Feature("relation_qq", layers=((1, 3),)),
    ]
    widths = projections(features, STUDENT, TEACHER)
    assert widths == dict.fromkeys(["hidden_mse_0_1", "hidden_mse_1_3", "contrastive_1_3"], (32, 24))
    assert projections(features, STUDENT, STUDENT) == {}
    drawn = init_projections(widths, jax.random.key(0))
    kernels = [row["kernel"] for row in drawn.values()]
    assert all(np.std(kernel) == pytest.approx(32**-0.5, rel=0.1) for kernel in kernels)
    assert not np.allclose(kernels[0], kernels[1])
    np.testing.assert_array_equal(
        init_projections({"contrastive_1_3": (32, 24)}, jax.random.key(0))["contrastive_1_3"]["kernel"], kernels[2]
    )


def test_names_and_taps():
    features = [
        Feature("hidden_mse", layers=((1, 3), (0, 1))),
        Feature("relation_kk", layers=((1, 3),)),
        Feature("hidden_mse", layers=((1, 2),)),
    ]
    assert list(named(features)) == ["hidden_mse_1", "relation_kk", "hidden_mse_2"]
    assert tapped(features, 0) == {"hidden": (0, 1), "k": (1,)}
    assert tapped(features, 1) == {"hidden": (1, 2, 3), "k": (3,)}
    assert list(named([replace(features[0])])) == ["hidden_mse"]


@pytest.fixture(scope="module")
def config(home):  # noqa: F811
    """A run that has only inner layers to learn from its teacher, and another width than it."""
    tiny = configs.load(str(home / "tiny.py"))
    teacher = ModelSpec(architecture=replace(tiny.student.architecture, width=24, layers=3))
    features = (Feature(weight=5.0), Feature("relation_qq"), Feature("contrastive", 0.1, layers=((1, 2),)))
    return replace(tiny, teacher=teacher, prompt="", objective=ObjectiveConfig(alpha=1.0, features=features))


def test_a_config_with_features_is_saved_read_and_changed_by_flags(config):
    assert from_json(to_json(config), Config) == config
    flags = ["--objective.features.0.weight", "2", "--objective.features.1.layers", "0", "1", "1", "2"]
    changed = configs.override(config, flags, "kdjax train tiny.py").objective.features
    assert (changed[0].weight, changed[1].layers) == (2.0, ((0, 1), (1, 2)))
    assert differences(config, configs.override(config, flags[:2], "")) == ["objective.features.0.weight: 5.0 -> 2.0"]
    assert configs.override(replace(config, objective=ObjectiveConfig()), [], "").objective.features == ()
    with pytest.raises(UserError, match="unknown flag .*; did you mean --objective.features.0.weight"):
        configs.override(config, ["--objective.features.0.wieght", "2"], "")


@pytest.mark.slow
def test_a_run_trains_and_saves_projections_and_exports_none(config, home):  # noqa: F811
    train(config, home / "run")
    last, look = rows(home / "run")[-2:]
    assert {"hidden_mse", "relation_qq", "contrastive"} <= last.keys() and "eval_kl" in look
    assert not [name for name in look if "hidden" in name or "relation" in name]
    job = build(config)
    start = job.start()
    with Checkpoints(home / "run" / "checkpoints", config.checkpoint, job.frozen_names()) as checkpoints:
        state = checkpoints.restore(job.abstract_state).state
    names = {"hidden_mse_0_1", "hidden_mse_1_2", "contrastive_1_2"}
    assert state.params["projections"].keys() == start.params["projections"].keys() == names
    for name in names:
        before, after = (np.asarray(x.params["projections"][name]["kernel"]) for x in (start, state))
        assert before.shape == (16, 24) and 1e-3 < np.abs(after - before).max() < 0.1
    assert (
        parameter_paths(open_model(str(home / "run")).tensors).keys() == parameter_paths(state.params["student"]).keys()
    )
    again = train(config, home / "run")
    assert again["steps"] == 4


@pytest.mark.slow
def test_a_saved_state_goes_on_bit_for_bit(config, tmp_path):
    job = build(config)
    frozen, batches = job.frozen(), job.data.train(None)
    first, second = (job.place.put_batch(next(batches)[0]) for _ in range(2))
    state, _ = job.step(job.start(), frozen, first)
    with Checkpoints(tmp_path / "checkpoints", config.checkpoint) as checkpoints:
        checkpoints.save(1, state, {}, to_json(config))
        checkpoints.wait()
        restored = checkpoints.restore(job.abstract_state).state
    ends = [job.step(each, frozen, second) for each in (state, restored)]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inner_layers_without_a_teacher_are_refused(config):
    with pytest.raises(UserError, match="objective.features compares inner layers .* the config has no teacher"):
        build(replace(config, teacher=None))
    features = (Feature(layers=((0, 3),)),)
    with pytest.raises(UserError, match="the teacher has no layer 3; wanted one from 0 to 2"):
        build(replace(config, objective=ObjectiveConfig(features=features)))


def test_relations_of_encoders_are_with_later_tokens_too():
    student, teacher, segment, weight, _ = problem("relation_qq")
    arrays = [jnp.asarray(x, jnp.float32) for x in (student, teacher)]
    got = feature_sum(replace(feature_of("relation_qq"), causal=False), *arrays, segment, jnp.asarray(weight))
    total = 0.0
    for b, t in np.argwhere(weight > 0):
        keys = np.flatnonzero(segment[b] == segment[b, t])
        for head in range(HEADS):
            rows = []
            for x in (student, teacher):
                part = x[b].reshape(T, HEADS, -1)[:, head]
                exp = np.exp(part[keys] @ part[t] / np.sqrt(part.shape[-1]))
                rows.append(exp / exp.sum())
            total += weight[b, t] * np.sum(rows[1] * np.log(rows[1] / rows[0])) / HEADS
    assert got == pytest.approx(total, rel=1e-5)
    assert resolved(Feature("relation_kk"), STUDENT._replace(causal=False), TEACHER).causal is False


def test_means_of_texts_want_one_width():
    with pytest.raises(UserError, match="wanted one width, since means are not projected"):
        resolved(Feature("pooled_cosine"), STUDENT, TEACHER)
