"""Meshes and placement: what is refused, where things lie, and attention across devices."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models import attend
from kdjax.models.attention import see
from kdjax.sharding import MeshConfig, placement


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": -1, "data": 2}, (2, 4, 1, 1, 1)),
        ({"tensor": 2, "fsdp": 2}, (2, 2, 1, 1, 2)),
        ({"expert": 2, "tensor": 2}, (2, 1, 2, 1, 2)),
        ({"expert": -1, "data": 1}, (1, 1, 8, 1, 1)),
        ({"context": 4, "tensor": 2}, (1, 1, 1, 4, 2)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(mesh, shape):
    assert tuple(placement(MeshConfig(**mesh)).mesh.shape.values()) == shape


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            {"data": 3},
            "context=1, tensor=1 does not fill 8 devices; use data=-1, fsdp=1, expert=1, context=1, tensor=1$",
        ),
        ({"data": 3, "expert": -1}, "use data=-1, fsdp=1, expert=1, context=1, tensor=1$"),
        ({"data": 4, "expert": 4}, "use data=-1, fsdp=1, expert=4, context=1, tensor=1$"),
        ({"data": -1, "fsdp": -1}, "only one axis"),
        ({"expert": -1, "fsdp": -1, "data": 1}, "mesh.fsdp and mesh.expert are -1; only one axis"),
        ({"fsdp": 3}, "must divide 8"),
        ({"expert": 3}, r"tensor=1 does not fill 8 devices; fsdp \* expert \* context \* tensor must divide 8$"),
        ({"fsdp": 0}, "at least 1"),
        ({"expert": 0}, "{'expert': 0}; wanted at least 1"),
        ({"placement": "pmap", "tensor": 2}, "pmap replicates"),
        ({"placement": "pmap", "expert": 2}, "pmap replicates.* got fsdp=1, expert=2, context=1, tensor=1, wanted 1"),
        ({"placement": "pmap", "context": 2}, "pmap replicates.* expert=1, context=2, tensor=1, wanted 1 each"),
    ],
)
def test_impossible_meshes_are_one_clear_line(mesh, message):
    with pytest.raises(UserError, match=message):
        placement(MeshConfig(**mesh))


def test_a_batch_that_does_not_split_names_the_nearest_that_do():
    place = placement(MeshConfig(data=4, fsdp=2))
    with pytest.raises(
        UserError, match=r"250 .* 8 devices \(data=4, fsdp=2, expert=1, context=1, tensor=1\); use 248 or 256"
    ):
        place.check_batch(250, 1)
    with pytest.raises(UserError, match="4 microbatches; use 32 or 64"):
        place.check_batch(48, 4)
    place.check_batch(64, 4)
    with pytest.raises(UserError, match=r"4 devices .*expert=4, context=1, tensor=2\); use 4 or 8"):
        placement(MeshConfig(data=1, expert=4, tensor=2)).check_batch(6, 1)


def test_dimensions_that_do_not_divide_are_replicated():
    place = placement(MeshConfig(data=1, fsdp=4, tensor=2))
    assert tuple(place.sharding(("embed", "heads"), (64, 9)).spec) == ("fsdp", None)
    assert tuple(place.sharding(("embed", "heads"), (64, 8)).spec) == ("fsdp", "tensor")


def test_experts_and_examples_lie_over_the_expert_axis():
    """And nothing else does."""
    place = placement(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    names = ("layers", "experts", "embed", "expert_mlp")
    assert tuple(place.sharding(names, (3, 4, 8, 6)).spec) == (None, "expert", "fsdp", "tensor")
    assert tuple(place.sharding(names, (3, 5, 8, 7)).spec) == (None, None, "fsdp", None)
    assert tuple(place.sharding(("batch", None), (8, 3)).spec) == (("data", "fsdp", "expert"), None)
    assert tuple(place.sharding(("vocab", "embed"), (96, 8)).spec) == ("tensor", "fsdp")
    assert place.batch_devices == 4


def test_lazy_tensors_are_read_part_by_part():
    """Each device reads only its own slice."""

    class Lazy:
        shape, read_parts, casts = (8, 6), [], True

        def read(self, index):
            self.read_parts.append(index)
            return np.arange(48.0).reshape(8, 6)[index]

    place = placement(MeshConfig(data=1, fsdp=8))
    loaded = place.load({"w": Lazy()}, {"w": ("embed", None)}, "float32")["w"]
    np.testing.assert_array_equal(loaded, np.arange(48.0).reshape(8, 6))
    assert len(Lazy.read_parts) == 8 and all(part[0].stop - part[0].start == 1 for part in Lazy.read_parts)
    assert len(loaded.sharding.device_set) == 8 == len(jax.devices())


def test_rows_and_heads_that_do_not_split_over_context_are_refused():
    place = placement(MeshConfig(data=1, context=4, tensor=2))
    place.check_context({"data.sequence_length": 32}, {"student": 8, "teacher": 16})
    with pytest.raises(UserError, match="data.teacher_length 30 does not split over mesh.context 4; use 28 or 32$"):
        place.check_context({"data.sequence_length": 32, "data.teacher_length": 30}, {"student": 8})
    with pytest.raises(UserError, match=r"the teacher has 12 attention heads.* 8 devices \(context=4, tensor=2\)"):
        place.check_context({}, {"student": 8, "teacher": 12})
    placement(MeshConfig()).check_context({"data.sequence_length": 7}, {"student": 3})


@pytest.mark.parametrize("groups", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_attention_over_context_is_that_of_one_device(groups):
    """Value and gradients with segments, a window, a bias and slots before the keys; heads alone are exchanged."""
    (b, t, s, heads, k), rng = (4, 16, 18, 4, 8), np.random.default_rng(0)
    q, keys, values, bias, weight = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((b, t, heads, k), (b, s, groups, k), (b, s, groups, k), (1, heads, t, s), (b, t, heads, k))
    )
    segment = jnp.asarray(rng.integers(1, 3, (b, s)).cumsum(1) // 9)
    place = placement(MeshConfig(data=2, context=2, tensor=2))

    def loss(kernel, q, keys, values, bias):
        names = (("batch", "sequence", "heads", None), *[("batch", "sequence", "kv_heads", None)] * 2)
        q, keys, values = map(place.constrain, (q, keys, values), names)
        sight = replace(see(segment[:, s - t :], segment, s - t).within(5), bias_BHTS=bias)
        said = place.constrain(kernel(q, keys, values, sight), names[0])
        return jnp.sum(jnp.sin(said) * weight)

    def compiled(kernel):
        of = jax.value_and_grad(lambda *given: loss(kernel, *given), (0, 1, 2, 3))
        return jax.jit(of).lower(q, keys, values, bias).compile()

    exact = jax.jit(jax.value_and_grad(lambda *given: loss(attend, *given), (0, 1, 2, 3)))
    spread = compiled(place.attention(attend))
    got, want = spread(q, keys, values, bias), exact(q, keys, values, bias)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert re.search(r" all-to-all(-start)?\(", spread.as_text())
