"""Quantised weights are near their floats, compute as their floats would, and lie and are read in parts like any."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from kdjax.models import Model, ModelConfig, byte_count
from kdjax.models.model_file import lazy
from kdjax.models.paths import nested, parameter_paths
from kdjax.models.quantize import dequantized, kind_of, quantized, quantized_axes
from kdjax.shapes import View
from kdjax.sharding import MeshConfig, placement

SMALL = ModelConfig(vocab_size=50, width=64, layers=2, heads=4, kv_heads=2, head_width=32, mlp_width=96)
CONFIGS = {
    "tied": SMALL,
    "untied": replace(SMALL, tie_head=False, qkv_bias=True),
    "experts": replace(SMALL, family="mixtral", experts=3, experts_per_token=2),
    "encoder-decoder": replace(SMALL, family="t5", encoder_layers=1, positions="relative", gated_mlp=False),
    "widths that no group divides": replace(SMALL, width=40, head_width=10, mlp_width=36),
}
KINDS = ("int8", "int4")
EVERY_TIME = [("tied", "int8"), ("untied", "int8"), ("experts", "int4")]
REST = [each for each in itertools.product(CONFIGS, KINDS) if each not in EVERY_TIME]


def drawn(config, seed=0):
    """Random parameters, their rows and columns of very different size."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(Model(config).init, jax.random.key(0))
    return jax.tree.map(
        lambda x: (rng.standard_normal(x.shape) * np.exp(rng.standard_normal(x.shape[-1:]))).astype(np.float32), shapes
    )


def lazily(params, kind):
    return quantized(jax.tree.map(lazy, params), kind)


def loaded(params, kind, place=None, dtype="float32", config=SMALL):
    place = place or placement(MeshConfig(data=1), jax.devices()[:1])
    return place.load(lazily(params, kind), quantized_axes(Model(config).logical_axes(), kind), dtype)


def floats(params):
    return nested({path: np.asarray(dequantized(leaf, "float32")) for path, leaf in parameter_paths(params).items()})


def seen(config):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    view = View(tokens, np.ones_like(tokens), np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9)))
    return replace(view, encoder=view) if config.encoder_layers else view


def spread(weight, axes, group):
    """From the least to the largest entry of those that share a scale, 0 being one of them: all, or groups of 32."""
    low, high = np.minimum(weight, 0), np.maximum(weight, 0)
    if group is None:
        return np.broadcast_to(2 * np.maximum(-low, high).max(axes, keepdims=True), weight.shape)
    parts = [np.moveaxis(x, axes[-1], -1).reshape(*np.delete(weight.shape, axes[-1]), -1, group) for x in (low, high)]
    whole = parts[1].max(-1, keepdims=True) - parts[0].min(-1, keepdims=True)
    whole = np.broadcast_to(whole, parts[0].shape)
    return np.moveaxis(whole.reshape(*whole.shape[:-2], -1), -1, axes[-1])


INPUTS = {"q": (1,), "k": (1,), "v": (1,), "out": (1, 2), "gate": (1,), "up": (1,), "down": (1,)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_is_further_off_than_half_a_step(kind):
    params = drawn(SMALL)
    got = parameter_paths(floats(loaded(params, kind)))
    for path, weight in parameter_paths(params).items():
        name = path.split("/")[-2]
        if path == "embed/embedding":
            step = spread(weight, (1,), None) / 254
        elif path.endswith("kernel"):
            step = spread(weight, INPUTS[name], None if kind == "int8" else 32) / (254 if kind == "int8" else 15)
        else:
            np.testing.assert_array_equal(got[path], weight)
            continue
        # Zero points are whole numbers, so an end may be cut off by half a step; scales of 4 bits are bfloat16.
        slack = 1.0 if kind == "int8" or path == "embed/embedding" else 2.1
        assert np.all(np.abs(got[path] - weight) <= step / 2 * slack), path
        assert np.any(got[path] != weight), path


@pytest.mark.parametrize(
    ("name", "kind"), [*EVERY_TIME, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)]
)
def test_a_quantised_model_computes_with_the_floats_that_its_numbers_stand_for(name, kind):
    config = CONFIGS[name]
    model, params = Model(config), jax.tree.map(lambda x: x * 0.1, drawn(config))
    kept = loaded(params, kind, config=config)
    assert sum(isinstance(leaf, qwix.QArray) for leaf in parameter_paths(kept).values()) > 5
    got, want = model.apply(kept, seen(config)), model.apply(floats(kept), seen(config))
    np.testing.assert_allclose(got.hidden_BTD, want.hidden_BTD, atol=1e-5)
    np.testing.assert_array_equal(model.head(kept).w_DV, model.head(floats(kept)).w_DV)


@pytest.mark.parametrize("kind", KINDS)
def test_any_part_reads_as_the_part_of_the_whole(kind):
    config = CONFIGS["experts"]
    for path, leaf in parameter_paths(lazily(drawn(config), kind)).items():
        for tensor in jax.tree.leaves(leaf):
            whole = tensor.all()
            assert whole.shape == tensor.shape and whole.dtype == tensor.dtype
            part = tuple(slice(size // 3, size // 3 + (size + 1) // 2) for size in tensor.shape)
            np.testing.assert_array_equal(tensor.read(part), whole[part], err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mesh", [{"fsdp": 2, "expert": 4}, pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow)], ids=str
)
def test_the_same_numbers_lie_on_a_mesh(mesh, kind):
    config = replace(CONFIGS["experts"], experts=4)
    params = drawn(config)
    alone = loaded(params, kind, config=config)
    spread = loaded(params, kind, placement(MeshConfig(data=1, **mesh)), config=config)
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.asarray, tree) for tree in (alone, spread)))
    shard = spread["layers"]["experts"]["down"]["kernel"].qvalue.addressable_shards[0].data
    assert shard.size * 8 == np.prod([2, 4, 96, 64])


@pytest.mark.slow
def test_what_is_kept_takes_a_quarter_to_an_eighth_of_the_bytes():
    params = drawn(replace(SMALL, width=256, mlp_width=768, head_width=64, layers=3))
    whole = byte_count(params["layers"])
    assert whole == sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
    eighth, quarter = (byte_count(loaded(params, kind)["layers"]) / whole for kind in ("int4", "int8"))
    assert 1 / 8 < eighth < 1 / 6.8 and 1 / 4 < quarter < 1 / 3.9


def test_what_is_small_stays_as_it_is():
    config = replace(CONFIGS["experts"], positions="learned", tie_head=False)
    kinds = {path: kind_of(path, "int4") for path in parameter_paths(drawn(config))}
    assert {path for path, kind in kinds.items() if kind == "int8"} == {"embed/embedding", "head/kernel"}
    assert {path.split("/")[-1] for path, kind in kinds.items() if kind == "int4"} == {"kernel"}
    assert kinds["layers/router/kernel"] == kinds["positions/embedding"] == kinds["final_norm/scale"] == "none"


def test_other_dtypes_leave_numbers_and_scales_alone():
    kept = loaded(drawn(SMALL), "int8", dtype="bfloat16")
    assert kept["final_norm"]["scale"].dtype == jnp.bfloat16
    leaf = kept["layers"]["mlp"]["up"]["kernel"]
    assert (leaf.qvalue.dtype, leaf.scale.dtype) == (jnp.int8, jnp.float32)
