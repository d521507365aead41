"""Collectives read off compiled modules: those of functions that ask for known ones, and HLO as TPUs write it."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import scaling
from kdjax.plan.abstract import abstract_batch, abstract_frozen, abstract_job
from kdjax.plan.flops import step_flops
from kdjax.plan.hlo import Collective, axis_of, collectives, matmul_flops
from kdjax.plan.measure import sizes_of
from kdjax.sharding import MeshConfig, placement

MESH = {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
ALL = ("data", "fsdp", "tensor")
SIZE = 4 * 8 * 16  # bytes of a device's [8, 16] in float32


def compiled(function):
    """The text of a function of a device's part, [8, 16]."""
    places = P(ALL)
    mesh = placement(MeshConfig(data=2, fsdp=2, tensor=2)).mesh
    assert dict(mesh.shape) == MESH
    mapped = jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=places, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, places))
    return jax.jit(mapped).lower(x).compile().as_text()


@pytest.mark.parametrize(
    ("function", "row"),
    [
        (lambda x: lax.psum(x, "fsdp"), Collective("all-reduce", "fsdp", 2, 1, SIZE)),
        (lambda x: lax.psum(x, ("data", "fsdp")), Collective("all-reduce", "data+fsdp", 4, 1, SIZE)),
        (lambda x: lax.psum(x, ("data", "tensor")), Collective("all-reduce", "data+tensor", 4, 1, SIZE)),
        (lambda x: lax.psum(x, ALL), Collective("all-reduce", "data+fsdp+tensor", 8, 1, SIZE)),
        (lambda x: lax.all_gather(x, "tensor", tiled=True), Collective("all-gather", "tensor", 2, 1, 2 * SIZE)),
        (lambda x: lax.psum_scatter(x, "data", tiled=True), Collective("reduce-scatter", "data", 2, 1, SIZE)),
        (
            lambda x: lax.all_to_all(x, "fsdp", 0, 1, tiled=True),
            Collective("all-to-all", "fsdp", 2, 1, SIZE),
        ),
        (
            lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]),
            Collective("collective-permute", "tensor", 2, 1, SIZE),
        ),
    ],
)
def test_kind_axis_and_bytes_are_those_asked_for(function, row):
    assert collectives(compiled(function), MESH) == [row]


def test_loops_multiply():
    def inner(x, _):
        return jnp.sin(lax.psum(x, "data")), None

    def outer(x, _):
        return lax.psum(lax.scan(inner, x, None, length=5)[0], "tensor"), None

    found = collectives(compiled(lambda x: lax.scan(outer, x, None, length=3)[0]), MESH)
    assert found == [
        Collective("all-reduce", "data", 2, 15, 15 * SIZE),
        Collective("all-reduce", "tensor", 2, 3, 3 * SIZE),
    ]


def test_a_loop_whose_end_is_data_runs_as_often_as_is_said():
    def function(x):
        return lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, x: jnp.sin(lax.psum(x, "tensor")), x)

    text = compiled(function)
    assert [row.times for row in collectives(text, MESH, 7)] == [7]
    assert [row.times for row in collectives(text, MESH)] == [1]


def test_parameters_over_fsdp_are_gathered_and_their_gradient_reduced_once():
    mesh = placement(MeshConfig(data=1, fsdp=8)).mesh
    over = NamedSharding(mesh, P("fsdp"))
    w_DF = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=over)
    x_ND = jax.ShapeDtypeStruct((128, 64), jnp.float32, sharding=over)
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w))), out_shardings=over)
    found = collectives(step.lower(w_DF, x_ND).compile().as_text(), dict(mesh.shape))
    assert [(row.kind, row.axis, row.group, row.times, row.bytes) for row in found] == [
        ("all-gather", "fsdp", 8, 1, 4 * 64 * 32),
        ("all-reduce", "fsdp", 8, 1, 4 * 64 * 32),
    ]


def test_what_is_sent_is_that_of_a_ring():
    rows = {kind: Collective(kind, "fsdp", 4, 1, 1000) for kind in ("all-gather", "all-reduce", "collective-permute")}
    assert [row.sent for row in rows.values()] == [750, 1500, 1000]


@pytest.mark.parametrize(
    ("groups", "axis", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor", 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("[4,2]<=[8]", "tensor", 2),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("[2,4]<=[4,2]T(1,0)", "data+fsdp", 4),
        ("[1,8]<=[8]", "data+fsdp+tensor", 8),
        ("mesh['a'=2,'b'=4] {'a'}", "data", 2),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", "data+tensor", 4),
        ("{}", "data+fsdp+tensor", 8),
        ("{{0,3},{1,2},{4,7},{5,6}}", "?", 2),
    ],
)
def test_axes_are_known_by_the_groups(groups, axis, size):
    line = f"%r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    assert axis_of(line, MESH) == (axis, size)


TPU = """HloModule jit_step, is_scheduled=true

%started (param_0: bf16[2,8]) -> (bf16[2,8], bf16[16,8], u32[]) {
  %param_0 = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=5, replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%ended (param_0.1: bf16[2,8]) -> bf16[16,8] {
  %param_0.1 = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=5, replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = bf16[16,8]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (wide.param: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %wide.param = (s32[]{:T(128)}, bf16[2,8]{1,0}) parameter(0)
  %fusion.1 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) fusion(%wide.param), kind=kCustom, calls=%started
  %fusion.2 = bf16[16,8]{1,0} fusion(%fusion.1), kind=kCustom, calls=%ended
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[2,8]{1,0}) tuple(%wide.param, %fusion.2)
}

%condition (wide.param.1: (s32[], bf16[2,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32), metadata={stack_frame_id=1}
  %wide.param.1 = (s32[]{:T(128)}, bf16[2,8]{1,0}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT, metadata={stack_frame_id=2}
}

ENTRY %main (param: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %param = (s32[]{:T(128)}, bf16[2,8]{1,0}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[2,8]{1,0}) while(%param), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_collective_that_a_tpu_spreads_over_fusions_counts_once_and_its_loop_is_counted():
    found = collectives(TPU, {"data": 1, "fsdp": 8})
    assert found == [Collective("all-gather", "fsdp", 8, 32, 32 * 2 * 16 * 8)]
    assert np.isclose(found[0].sent, 32 * 2 * 16 * 8 * 7 / 8)


GPU = """HloModule jit_step, is_scheduled=true

ENTRY %main (p: bf16[32,16], q: bf16[4,16]) -> (bf16[4,16], bf16[4,2]) {
  %p = bf16[32,16]{1,0} parameter(0)
  %q = bf16[4,16]{1,0} parameter(1)
  %s = ((bf16[32,16]{1,0}, bf16[32,2]{1,0}), (bf16[4,16]{1,0}, bf16[4,2]{1,0})) reduce-scatter-start(%p, %p), channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true
  %d = (bf16[4,16]{1,0}, bf16[4,2]{1,0}) reduce-scatter-done(%s)
  %g = (bf16[4,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%q), channel_id=2, replica_groups=[1,8]<=[8], use_global_device_ids=true
  %h = bf16[32,16]{1,0} all-gather-done(%g)
  %r = bf16[32,16]{1,0} all-reduce-start(%h), channel_id=3, replica_groups=[1,8]<=[8], use_global_device_ids=true
  %e = bf16[32,16]{1,0} all-reduce-done(%r)
  ROOT %t = (bf16[4,16]{1,0}, bf16[4,2]{1,0}) tuple(%d, %d)
}
"""  # noqa: E501


def test_what_a_gpu_starts_and_ends_counts_once_and_whole():
    assert collectives(GPU, {"data": 1, "fsdp": 8}) == [
        Collective("reduce-scatter", "fsdp", 8, 1, 2 * 32 * (16 + 2)),
        Collective("all-gather", "fsdp", 8, 1, 2 * 32 * 16),
        Collective("all-reduce", "fsdp", 8, 1, 2 * 32 * 16),
    ]


def test_matmuls_count_as_often_as_loops_run_them():
    def function(x, w):
        def body(carry, w_):
            return jnp.tanh(carry @ w_), None

        carry, _ = lax.scan(body, x, w)
        return jnp.einsum("bij,bkj->bik", carry, carry)

    shapes = jax.ShapeDtypeStruct((3, 8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    text = jax.jit(function).lower(*shapes).compile().as_text()
    assert matmul_flops(text, MESH) == 5 * 2 * 3 * 8 * 16 * 16 + 2 * 3 * 8 * 8 * 16


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"data": 2, "context": 4}, {"tensor": 4, "data": 2}])
def test_a_steps_matmuls_are_those_that_are_counted(sizes):
    config = scaling.config("data", 1, 8)
    config = replace(config, mesh=replace(config.mesh, **sizes))
    devices = math.prod(sizes.values())
    job = abstract_job(config, jax.devices()[:devices])
    text = job.step.lower(job.abstract_state, abstract_frozen(job), abstract_batch(job)).compile().as_text()
    each = sizes_of(job, "cpu")
    found = matmul_flops(text, dict(job.place.mesh.shape), -(-each.tokens // each.chunk))
    assert found * devices == step_flops(config, job.student.model.config, job.teacher.model.config).done
