"""Adapters compute what their paper says, wherever a kernel stands; parts of a model are parted and joined exactly."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models import Model, ModelConfig, ModelFile, ModelSpec, lora
from kdjax.models.config import Lora
from kdjax.models.model_file import lazy
from kdjax.models.paths import nested, parameter_paths
from kdjax.shapes import View

SMALL = ModelConfig(vocab_size=40, width=16, layers=3, heads=4, kv_heads=2, head_width=6, mlp_width=20)
CONFIGS = {
    "decoder": SMALL,
    "encoder-decoder": replace(SMALL, family="t5", encoder_layers=2, positions="relative", gated_mlp=False),
    "encoder with biases": replace(SMALL, family="bert", causal=False, norms="sum", qkv_bias=True, mlp_bias=True),
}
RANK = Lora(rank=3, alpha=7.5)
SPEC = ModelSpec(lora=RANK)


def view():
    rng = np.random.default_rng(0)
    tokens, ones = rng.integers(0, 40, (2, 7)).astype(np.int32), np.ones((2, 7), np.int32)
    return View(tokens, ones, np.cumsum(ones, 1, dtype=np.int32) - 1)


def random_adapters(params, spec=RANK, seed=1):
    """Adapters of which neither factor is 0."""
    rng = np.random.default_rng(seed)
    found = jax.eval_shape(lambda: lora.init_adapters(spec, params, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) * 0.3, found)


def added_by_hand(params, adapters, spec=RANK):
    """W + α/rank·a·b, a sum over the rank for every entry of every layer, in float64."""
    paths, beside = (
        {p: np.asarray(x, np.float64) for p, x in parameter_paths(params).items()},
        parameter_paths(adapters),
    )
    for path in {path.rpartition("/")[0] for path in beside}:
        a, b = (beside[f"{path}/lora_{which}"].astype(np.float64) for which in "ab")
        for layer in range(len(a)):
            if path.endswith("/out"):
                delta = np.einsum("hkr,rd->hkd", a[layer], b[layer])
            else:
                delta = np.einsum("dr,r...->d...", a[layer], b[layer])
            paths[f"{path}/kernel"][layer] += spec.alpha / spec.rank * delta
    return nested({path: x.astype(np.float32) for path, x in paths.items()})


@pytest.mark.parametrize(
    "name", ["decoder", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "decoder")]
)
def test_an_adapter_is_a_low_rank_matrix_added_to_its_kernel(name):
    model, seen = Model(CONFIGS[name]), view()
    seen = replace(seen, encoder=view()) if model.config.encoder_layers else seen
    params = model.init(jax.random.key(0))
    adapters = random_adapters(params)
    got = model.apply(lora.assembled(params, adapters, RANK.alpha / RANK.rank), seen).hidden_BTD
    want = model.apply(added_by_hand(params, adapters), seen).hidden_BTD
    np.testing.assert_allclose(got, want, atol=3e-5)  # float32: the adapter's branch, or one sum of kernels
    assert np.abs(got - model.apply(params, seen).hidden_BTD).max() > 0.1


def test_new_adapters_add_nothing_and_are_spread_by_their_inputs():
    params = Model(SMALL).init(jax.random.key(0))
    adapters = parameter_paths(lora.init_adapters(RANK, params, jax.random.key(1)))
    assert adapters["layers/attention/q/lora_a"].shape == (3, 16, 3)
    assert adapters["layers/attention/out/lora_a"].shape == (3, 4, 6, 3)
    assert adapters["layers/attention/out/lora_b"].shape == (3, 3, 16)
    for path, leaf in adapters.items():
        if path.endswith("lora_b"):
            assert not np.any(leaf)
        else:
            bound = np.prod(leaf.shape[1:-1]) ** -0.5
            assert 0.8 * bound < np.abs(leaf).max() <= bound
    several = [np.asarray(leaf).reshape(-1)[:9] for path, leaf in adapters.items() if path.endswith("lora_a")]
    assert len({tuple(values) for values in several}) == len(several)


def test_targets_are_chosen_by_name_and_experts_are_left_alone():
    moe = replace(SMALL, experts=2, experts_per_token=1)
    of = lambda config, spec: set(  # noqa: E731
        parameter_paths(
            lora.init_adapters(spec, jax.eval_shape(Model(config).init, jax.random.key(0)), jax.random.key(0))
        )
    )
    queries = {f"layers/attention/{name}/lora_{which}" for name in "qv" for which in "ab"}
    assert of(SMALL, Lora(2, targets=("q", "v"))) == queries
    assert of(moe, Lora(2)) == {f"layers/attention/{n}/lora_{w}" for n in ("q", "k", "v", "out") for w in "ab"}
    assert of(SMALL, Lora()) == set()


def test_axes_of_adapters_are_those_of_their_kernels():
    model = Model(SMALL)
    names = parameter_paths(lora.adapter_axes(RANK, model.logical_axes()))
    shapes = parameter_paths(lora.init_adapters(RANK, model.init(jax.random.key(0)), jax.random.key(0)))
    assert {path: len(axes) for path, axes in names.items()} == {path: leaf.ndim for path, leaf in shapes.items()}
    assert names["layers/attention/out/lora_a"] == ("layers", "heads", "head_width", None)
    assert names["layers/attention/q/lora_b"] == ("layers", None, "heads", "head_width")
    assert names["layers/mlp/down/lora_b"] == ("layers", None, "embed")


@pytest.mark.parametrize("trained", [(), ("layers/mlp", "final_norm"), ("layers/mlp/up/kernel",)])
def test_parts_join_to_the_whole(trained):
    params = Model(SMALL).init(jax.random.key(0))
    spec = replace(SPEC, trained=trained)
    first, second = lora.part(params, lambda path: lora.is_trained(spec, path))
    assert jax.tree.structure(lora.join(first, second)) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, lora.join(second, first), params))
    begins = tuple(f"{name}/" for name in trained)
    assert all(f"{path}/".startswith(begins) for path in parameter_paths(first))
    assert not any(f"{path}/".startswith(begins) for path in parameter_paths(second)) if trained else first == {}


def test_a_path_is_named_by_whole_words():
    spec = replace(SPEC, trained=("layers/mlp",))
    assert lora.is_trained(spec, "layers/mlp/up/kernel")
    assert not lora.is_trained(spec, "layers/mlp_norm/scale")


def file_of(params, config=SMALL):
    return ModelFile(config, jax.tree.map(lambda x: lazy(np.asarray(x)), params), "base", None)


def test_a_merged_file_gives_the_sum_of_whatever_is_read_of_it():
    params = jax.tree.map(np.asarray, Model(SMALL).init(jax.random.key(0)))
    adapters = random_adapters(params)
    scale = np.full(16, 3.0, np.float32)
    got = lora.merged(file_of(params), lora.join(adapters, {"final_norm": {"scale": scale}}), RANK)
    want = parameter_paths(added_by_hand(params, adapters)) | {"final_norm/scale": scale}
    for path, tensor in parameter_paths(got.tensors).items():
        np.testing.assert_allclose(tensor.all(), want[path], atol=2e-6, err_msg=path)
        part = (slice(1, 2), *(slice(0, (size + 1) // 2) for size in tensor.shape[1:]))
        np.testing.assert_allclose(tensor.read(part), want[path][part], atol=2e-6, err_msg=path)


def test_what_does_not_fit_its_base_is_refused():
    params = jax.tree.map(np.asarray, Model(SMALL).init(jax.random.key(0)))
    wide = jax.tree.map(np.asarray, Model(replace(SMALL, width=24)).init(jax.random.key(0)))
    with pytest.raises(UserError, match=r"the adapter of layers/\S+ has shapes .* its kernel has"):
        lora.merged(file_of(params), random_adapters(wide), RANK)
    with pytest.raises(UserError, match=r"final_norm/scale of shape \(24,\) has no place in base"):
        lora.merged(file_of(params), {"final_norm": wide["final_norm"]}, RANK)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            ModelSpec(trained=("layer/mlp",)),
            r"trained names 'layer/mlp', where no parameter's path begins; did you mean",
        ),
        (ModelSpec(lora=Lora(2, targets=("query",))), r"lora.targets names 'query'"),
        (ModelSpec(lora=Lora(2, targets=("gate",))), r"none of the matrices that lora.targets names: gate"),
    ],
)
def test_names_that_fit_nothing_are_refused(spec, said):
    params = jax.eval_shape(Model(replace(SMALL, gated_mlp=False)).init, jax.random.key(0))
    with pytest.raises(UserError, match=said):
        lora.check(spec, params)


def test_a_rank_below_0_is_refused():
    with pytest.raises(UserError, match=r"lora.rank is -1"):
        Lora(rank=-1)
