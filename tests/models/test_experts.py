"""Mixture of experts against a plain loop in float64: every pick counts, wherever the experts lie."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models import Model, ModelConfig
from kdjax.models.experts import Experts, Kernels, Picks, here, through_experts
from kdjax.shapes import View
from kdjax.sharding import MeshConfig, placement

B, T, D, F, E, P = 2, 7, 6, 5, 4, 2
CONFIG = ModelConfig(width=D, heads=2, kv_heads=1, head_width=4, mlp_width=F, experts=E, experts_per_token=P)


def problem(seed=0):
    rng = np.random.default_rng(seed)
    x_BTD, scores_BTE = rng.normal(size=(B, T, D)), 2 * rng.normal(size=(B, T, E))
    return x_BTD, scores_BTE, Kernels(*(rng.normal(size=s) for s in ((E, D, F), (E, D, F), (E, F, D))))


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def picked(scores_BTE, normalise=True):
    probs_BTE = np.exp(scores_BTE) / np.exp(scores_BTE).sum(-1, keepdims=True)
    expert_BTP = np.argsort(-probs_BTE, axis=-1)[..., :P]
    weight_BTP = np.take_along_axis(probs_BTE, expert_BTP, -1)
    return probs_BTE, expert_BTP, weight_BTP / (weight_BTP.sum(-1, keepdims=True) if normalise else 1)


def by_loop(x_BTD, kernels, expert_BTP, weight_BTP):
    y_BTD = np.zeros_like(x_BTD)
    for b, t, p in np.ndindex(expert_BTP.shape):
        gate_DF, up_DF, down_FD = (kernel[expert_BTP[b, t, p]] for kernel in kernels)
        gate_F = x_BTD[b, t] @ gate_DF
        y_BTD[b, t] += weight_BTP[b, t, p] * ((gate_F / (1 + np.exp(-gate_F))) * (x_BTD[b, t] @ up_DF)) @ down_FD
    return y_BTD


def run(x_BTD, scores_BTE, kernels, is_real_BT, config=CONFIG):
    params = {name: {"kernel": kernel} for name, kernel in zip(("gate", "up", "down"), kernels, strict=True)}
    module = Experts(config, jnp.float32, here)
    return module.apply({"params": params}, *float32((x_BTD, scores_BTE)), is_real_BT)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_sum_over_picks_is_that_of_a_loop(normalise):
    x_BTD, scores_BTE, kernels = problem()
    config = ModelConfig(**vars(CONFIG) | {"normalise_picks": normalise})
    got, _ = run(x_BTD, scores_BTE, float32(kernels), np.ones((B, T), bool), config)
    _, expert_BTP, weight_BTP = picked(scores_BTE, normalise)
    np.testing.assert_allclose(got, by_loop(x_BTD, kernels, expert_BTP, weight_BTP), rtol=1e-4, atol=2e-5)


def test_no_token_is_dropped_where_all_want_one_expert():
    x_BTD, scores_BTE, kernels = problem()
    scores_BTE[..., 1] += 50
    got, _ = run(x_BTD, scores_BTE, float32(kernels), np.ones((B, T), bool))
    _, expert_BTP, weight_BTP = picked(scores_BTE)
    assert (expert_BTP[..., 0] == 1).all()
    np.testing.assert_allclose(got, by_loop(x_BTD, kernels, expert_BTP, weight_BTP), rtol=1e-4, atol=2e-5)


def test_experts_apart_add_up_to_all_in_value_and_gradient():
    """What each of two devices gives for its half; and the gradient is that of a sum over all experts, masked."""
    x_BTD, scores_BTE, kernels = problem()
    _, expert_BTP, weight_BTP = picked(scores_BTE)
    x_BTD, kernels, picks = float32((x_BTD, kernels, Picks(expert_BTP, weight_BTP)))
    picks = picks._replace(expert_BTP=jnp.asarray(expert_BTP))
    weight_BTE = jnp.sum(jax.nn.one_hot(expert_BTP, E) * picks.weight_BTP[..., None], axis=2)

    def whole(x_BTD, kernels):
        return jnp.sum(jnp.sin(through_experts("silu", x_BTD, picks, kernels, 0)))

    def in_halves(x_BTD, kernels):
        halves = (jax.tree.map(lambda kernel, at=at: kernel[at : at + 2], kernels) for at in (0, 2))
        parts = (through_experts("silu", x_BTD, picks, half, first) for half, first in zip(halves, (0, 2), strict=True))
        return jnp.sum(jnp.sin(sum(parts)))

    def masked(x_BTD, kernels):
        inner_BTEF = jax.nn.silu(jnp.einsum("btd,edf->btef", x_BTD, kernels.gate_EDF))
        inner_BTEF = inner_BTEF * jnp.einsum("btd,edf->btef", x_BTD, kernels.up_EDF)
        y_BTED = jnp.einsum("btef,efd->bted", inner_BTEF, kernels.down_EFD)
        return jnp.sum(jnp.sin(jnp.einsum("bted,bte->btd", y_BTED, weight_BTE)))

    wanted = jax.value_and_grad(masked, (0, 1))(x_BTD, kernels)
    for way in (whole, in_halves):
        got = jax.value_and_grad(way, (0, 1))(x_BTD, kernels)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, wanted)


MESHES = {
    "experts": {"expert": 2},
    "experts, rows do not divide": {"expert": 4},
    "experts and rows do not divide": {"expert": 3},
    "width": {"tensor": 5},
    "width does not divide": {"tensor": 2},
    "experts, width does not divide": {"expert": 2, "tensor": 2},
    "other rows too, which do not divide": {"fsdp": 2, "expert": 2},
}


@pytest.mark.parametrize("sizes", [pytest.param(sizes, id=name) for name, sizes in MESHES.items()])
def test_a_mesh_of_any_shape_gives_what_one_device_gives(sizes):
    """B = 2 rows, E = 4 experts of width F = 5: value and gradient, whatever of these divides."""
    x_BTD, scores_BTE, kernels = problem()
    _, expert_BTP, weight_BTP = picked(scores_BTE)
    place = placement(MeshConfig(data=1, **sizes), jax.devices()[: math.prod(sizes.values())])

    def of(dispatch):
        def loss(x_BTD, weight_BTP, kernels):
            picks = Picks(jnp.asarray(expert_BTP), weight_BTP)
            return jnp.sum(jnp.sin(dispatch(partial(through_experts, "silu"), x_BTD, picks, kernels)))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*float32((x_BTD, weight_BTP, kernels)))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), of(place.dispatch), of(here))


def test_tokens_go_to_the_experts_and_kernels_stay_where_they_are():
    """The compiled module: tokens are gathered and their sums scattered; of kernels nothing crosses devices."""
    rows, place = 8, placement(MeshConfig(data=2, expert=4))
    x_BTD, picks = np.zeros((rows, T, D), np.float32), Picks(np.zeros((rows, T, P), int), np.zeros((rows, T, P)))
    of_row = place.sharding(("batch", None, None), x_BTD.shape)
    where = of_row, Picks(of_row, of_row), Kernels(*(place.sharding(("experts", None, None), (E, D, F)),) * 3)
    run = jax.jit(partial(place.dispatch, partial(through_experts, "silu")), in_shardings=where)
    module = run.lower(x_BTD, picks, float32(problem()[2])).compile().as_text()
    crossing = re.findall(r"= \w+\[([\d,]+)\]\S* (all-\w+|reduce-scatter|collective-permute)\(", module)
    of_group = {(f"{rows // 2},{T},{n}", "all-gather") for n in (D, P)}
    assert set(crossing) == of_group | {(f"{rows // 8},{T},{D}", "reduce-scatter")}


def test_load_balance_is_that_of_real_tokens():
    x_BTD, scores_BTE, kernels = problem()
    real_BT = np.arange(T)[None] < np.array([[5], [2]])
    _, aux = run(x_BTD, scores_BTE, float32(kernels), real_BT)
    probs_BTE, expert_BTP, _ = picked(scores_BTE)
    share_E = np.array([(expert_BTP[real_BT] == e).sum() for e in range(E)]) / real_BT.sum()
    np.testing.assert_allclose(aux["load_balance"], E * share_E @ probs_BTE[real_BT].mean(0), rtol=1e-5)
    everywhere_BTE = np.zeros((1, E, E)) + np.roll(np.eye(E), 1, 1)[None] + np.eye(E)[None]
    even = run(np.zeros((1, E, D)), 1e-3 * everywhere_BTE, float32(kernels), np.ones((1, E), bool))[1]
    np.testing.assert_allclose(even["load_balance"], P, rtol=1e-5)


def test_a_model_gives_the_mean_over_its_layers_and_the_router_learns():
    model = Model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens_BT = np.arange(2 * 9, dtype=np.int32).reshape(2, 9)
    position_BT = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    view = View(tokens_BT, np.ones_like(tokens_BT), position_BT)

    @jax.jit
    def of(params):
        output = model.apply(params, view)
        return jnp.sum(jnp.square(output.hidden_BTD[..., 0])), output.aux

    gradient, aux = jax.grad(of, has_aux=True)(params)
    assert 1.5 < float(aux["load_balance"]) < 3
    assert np.abs(gradient["layers"]["router"]["kernel"]).max() > 0
    assert gradient["layers"]["experts"]["down"]["kernel"].shape == (2, E, F, D)


@pytest.mark.parametrize("change", [{"experts": -1}, {"experts_per_token": 5}, {"experts_per_token": 0}])
def test_an_impossible_number_of_experts_is_refused(change):
    with pytest.raises(UserError, match="wanted from 1 to experts, or no experts"):
        ModelConfig(**vars(CONFIG) | change)
