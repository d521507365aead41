"""The table logical axis -> mesh axes, and the placement of the one step by jit or by pmap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.errors import UserError
from kdjax.shapes import Array, Axes
from kdjax.sharding.exchange import Exchanged, Kernel
from kdjax.sharding.mesh import AXES, BATCH_AXES, MeshConfig, TeacherMeshConfig, sizes_text

ON_HOST = "pinned_host"
"""What jax calls the memory of a host that devices read by themselves."""

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "sequence": "context",
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "exchanged_heads": ("tensor", "context"),
    "mlp": "tensor",
    "experts": "expert",
    "expert_mlp": "tensor",
}
"""Logical axis -> mesh axes; a logical axis without a row, or that does not divide, is replicated."""


@dataclass(frozen=True)
class Placement:
    """Where arrays lie and how functions run: the step itself knows nothing of it.

    Attributes:
        mesh: the devices.
        by: how functions are placed on them.
        memory: the kind of memory that arrays lie in; None is the devices' own.
    """

    mesh: Mesh
    by: Literal["jit", "pmap"]
    memory: str | None = None

    @property
    def on_host(self) -> Placement:
        """The same devices' parts in the memory of their hosts, from where devices fetch them by themselves."""
        return replace(self, memory=ON_HOST)

    @property
    def axis_name(self) -> str | None:
        """The axis that the step itself must sum over; None where jit does."""
        return "data" if self.by == "pmap" else None

    @property
    def batch_devices(self) -> int:
        """Over how many devices the examples of a batch are split."""
        return prod(self.mesh.shape[name] for name in BATCH_AXES)

    @property
    def reading(self) -> tuple[int, int]:
        """Which part of each batch this process reads, of how many: processes that share examples read the same one.

        Raises:
            UserError: a mesh that lays parts of what one process reads on another.
        """
        places = NamedSharding(self.mesh, P(BATCH_AXES)).devices_indices_map((self.batch_devices,))
        of_process: dict[int, set[int]] = {}
        for device, (rows,) in places.items():
            of_process.setdefault(device.process_index, set()).add(rows.start or 0)
        parts = sorted({tuple(sorted(rows)) for rows in of_process.values()})
        if sum(map(len, parts)) != self.batch_devices:
            raise UserError(
                f"a mesh of {sizes_text(dict(self.mesh.shape))} lays examples across the borders of {len(of_process)} "
                "processes; let context * tensor divide the devices of a process, or be a multiple of them"
            )
        return parts.index(tuple(sorted(of_process[jax.process_index()]))), len(parts)

    def check_batch(self, batch_size: int, microbatches: int) -> None:
        """Check that every microbatch splits evenly.

        Raises:
            UserError: with the nearest batch sizes that do.
        """
        unit = self.batch_devices * microbatches
        if batch_size < 1 or batch_size % unit:
            low, high = batch_size // unit * unit, (batch_size // unit + 1) * unit
            parts = f"{self.batch_devices} devices ({sizes_text(dict(self.mesh.shape))})"
            parts += f" and {microbatches} microbatches" if microbatches > 1 else ""
            raise UserError(
                f"batch_size {batch_size} does not split over {parts}; use {f'{low} or ' if low else ''}{high}"
            )

    def check_context(self, lengths: Mapping[str, int], heads: Mapping[str, int]) -> None:
        """Check that rows split over the context axis, and that each device gets as many heads of each model.

        Raises:
            UserError: with the nearest lengths that do, or the sizes that fit.
        """
        context, tensor = self.mesh.shape["context"], self.mesh.shape["tensor"]
        if context == 1:
            return
        for name, length in lengths.items():
            if length % context:
                low, high = length // context * context, (length // context + 1) * context
                near = f"{low} or {high}" if low else high
                raise UserError(f"{name} {length} does not split over mesh.context {context}; use {near}")
        for who, count in heads.items():
            if count % (context * tensor):
                raise UserError(
                    f"the {who} has {count} attention heads, which do not split over {context * tensor} devices "
                    f"(context={context}, tensor={tensor}); choose sizes whose product divides {count}"
                )

    def sharding(self, names: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Return where an array of so named dimensions lies; under pmap every device holds all of it."""
        if self.by == "pmap":
            return self.replicated
        axes = (self._axes(name, size) for name, size in zip(names, shape, strict=True))
        return NamedSharding(self.mesh, P(*axes), memory_kind=self.memory)

    def _axes(self, name: str | None, size: int) -> str | tuple[str, ...] | None:
        axes = RULES.get(name) if name else None
        total = prod(self.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        return axes if total > 1 and size % total == 0 else None

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds all of it."""
        return NamedSharding(self.mesh, P(), memory_kind=self.memory)

    def constrain(self, x: Array, names: tuple[str | None, ...]) -> Array:
        """Return `x`, laid out as its named dimensions ask, within a computation."""
        return x if self.by == "pmap" else jax.lax.with_sharding_constraint(x, self.sharding(names, x.shape))

    def state_shardings(self, abstract_state: Any, params_axes: Any) -> Any:
        """Return a sharding for each leaf of a training state.

        Parameters lie as their axes ask; a leaf whose path ends in a parameter's path and that has as many dimensions
        (an optimiser's moment) lies with it; all else is replicated.
        """
        of_path = {
            tuple(_key(k) for k in path): names
            for path, names in jax.tree_util.tree_leaves_with_path(params_axes, is_leaf=lambda x: isinstance(x, tuple))
        }

        def place(path, leaf):
            keys = tuple(_key(k) for k in path)
            names = next((of_path[keys[i:]] for i in range(len(keys)) if keys[i:] in of_path), None)
            return self.sharding(names, leaf.shape) if names and len(names) == len(leaf.shape) else self.replicated

        return jax.tree_util.tree_map_with_path(place, abstract_state)

    def load(self, tensors: Any, axes: Any, dtype: str) -> Any:
        """Return arrays of the mesh from lazy tensors (`shape`, `read(index)`, `casts`), each device's part read alone.

        What `casts` becomes `dtype`; what is quantised stays as it is.
        """

        def put(lazy: Any, names: tuple[str | None, ...]) -> Array:
            where, kept = self.sharding(names, lazy.shape), dtype if lazy.casts else lazy.dtype
            return jax.make_array_from_callback(lazy.shape, where, lambda index: lazy.read(index).astype(kept))

        return jax.tree.map(put, tensors, axes)

    def put_batch(self, batch: Any) -> Any:
        """Return this process's rows of a batch as arrays of the whole mesh."""
        if self.by == "pmap":
            n = len(self.mesh.local_devices)
            return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
        where = NamedSharding(self.mesh, P(BATCH_AXES))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), batch)

    def own_rows(self, tree: Any) -> Any:
        """Return this process's rows of arrays with a leading B, as `put_batch` takes them: numpy."""

        def own(x: Array) -> np.ndarray:
            found = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
            return np.concatenate([np.asarray(found[start]) for start in sorted(found)])

        return jax.tree.map(own, tree)

    def compile_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function, all of whose results have a leading B, compiled so that each device keeps its own rows."""
        return jax.jit(function, out_shardings=NamedSharding(self.mesh, P(BATCH_AXES)))

    def take_rows(self, tree: Any) -> Any:
        """Return arrays with a leading B that lie on another mesh, as arrays of this one.

        Each process has the same rows on both (`reading`), so none sends any. Devices copy to devices, and nothing
        waits: a `jax.device_put` of the whole would fetch it where the meshes split the rows into other parts.
        """
        where = NamedSharding(self.mesh, P(BATCH_AXES))

        def take(x: Array) -> Array:
            wanted: Any = where.addressable_devices_indices_map(x.shape)
            copies = [
                _rows(x, rows.indices(len(x)), n, device) for n, (device, (rows, *_)) in enumerate(wanted.items())
            ]
            return jax.make_array_from_single_device_arrays(x.shape, where, copies)

        return jax.tree.map(take, tree)

    def compile_step(self, step: Callable[..., Any], state_shardings: Any) -> Callable[..., Any]:
        """Return ``step(state, frozen, batch) -> (state, metrics)`` placed on the mesh; the old state is donated."""
        if self.by == "pmap":
            return jax.pmap(
                step,
                axis_name="data",
                in_axes=(None, None, 0),
                out_axes=None,
                donate_argnums=0,
                devices=list(self.mesh.devices.flat),
            )
        return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, self.replicated))

    def compile_sums(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function(params, frozen, batch) -> sums`` placed on the mesh."""
        if self.by == "pmap":
            return jax.pmap(
                function, axis_name="data", in_axes=(None, None, 0), out_axes=None, devices=list(self.mesh.devices.flat)
            )
        return jax.jit(function, out_shardings=self.replicated)

    def attention(self, kernel: Kernel) -> Kernel:
        """Return the kernel that a model is to be given (its `attention`) for what `kernel` does on one device."""
        return kernel if self.mesh.shape["context"] == 1 else Exchanged(self, kernel)

    def dispatch(self, local: Callable[..., Any], x_BTD: Array, picks: Any, kernels: Any) -> Array:
        """Return ``local(x_BTD, picks, kernels, number of the first one)`` added up over the devices of the experts.

        The `dispatch` of `kdjax.models.Model`: devices along `expert` gather each other's rows, take all of them
        through their own experts, and give each row's sum back to where it came from; along `context` each has a part
        of every row, along `tensor` of every expert's width. Kernels are gathered over fsdp. Where E or F does not
        divide, every device has all of it, and where B does not, every device has all rows.
        """
        if self.by == "pmap":
            return local(x_BTD, picks, kernels, 0)
        experts, _, width = kernels.gate_EDF.shape
        expert, tensor = self._axes("experts", experts), self._axes("expert_mlp", width)
        rows_split = x_BTD.shape[0] % self.batch_devices == 0
        gathers = expert is not None and rows_split
        summed = tuple(axis for axis in (tensor, None if gathers else expert) if axis)

        def run(x_BTD: Array, picks: Any, kernels: Any) -> Array:
            first = jax.lax.axis_index(expert) * kernels.gate_EDF.shape[0] if expert else 0
            if gathers:
                x_BTD, picks = jax.lax.all_gather((x_BTD, picks), expert, tiled=True)
            y_BTD = local(x_BTD, picks, kernels, first)
            y_BTD = jax.lax.psum_scatter(y_BTD, expert, tiled=True) if gathers else y_BTD
            return jax.lax.psum(y_BTD, summed)

        of_row = P(BATCH_AXES if rows_split else None, self._axes("sequence", x_BTD.shape[1]))
        wide = P(expert, None, tensor)
        specs = (of_row, of_row, kernels._replace(gate_EDF=wide, up_EDF=wide, down_EFD=P(expert, tensor)))
        # check_vma=False: as in shard_loss.
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=of_row, check_vma=False)(
            x_BTD, picks, kernels
        )

    def shard_loss(self, local: Callable[..., Any], tokens: Any, heads: Any, shared: Any) -> Any:
        """Return ``local(axes, tokens, heads, shared)`` run by each device on its own tokens, heads gathered over fsdp.

        Tokens are split over the batch axes and, where they divide, over context.

        The `shard` of `kdjax.losses.fused_kd_loss`: every leaf of `tokens` has a leading N, every leaf of `heads`
        ends in V, and every device gets all of `shared`; `local` returns (sums over the mesh, a tree with a leading N,
        a tree that ends in V).
        """
        if self.by == "pmap":
            return local(Axes(), tokens, heads, shared)
        parts, n = self.mesh.shape["tensor"], jax.tree.leaves(tokens)[0].shape[0]
        tensor = "tensor" if parts > 1 and all(x.shape[-1] % parts == 0 for x in jax.tree.leaves(heads)) else None
        over = (*BATCH_AXES, "context")
        over = over if n % prod(self.mesh.shape[axis] for axis in over) == 0 else BATCH_AXES
        of_token = P(over)
        of_head = jax.tree.map(lambda x: P(*[None] * (x.ndim - 1), tensor), heads)
        run = partial(local, Axes(over, tensor))
        kinds = jax.eval_shape(partial(local, Axes()), tokens, heads, shared)
        out = (
            jax.tree.map(lambda x: P(), kinds[0]),
            jax.tree.map(lambda x: of_token, kinds[1]),
            jax.tree.map(lambda x: P(*[None] * (x.ndim - 1), tensor), kinds[2]),
        )
        # check_vma=False: a scan carry that starts as zeros and becomes device-varying is a type error otherwise.
        specs = (of_token, of_head, jax.tree.map(lambda x: P(), shared))
        return jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(tokens, heads, shared)


def _rows(x: Array, rows: tuple[int, int, int], copy: int, device: Any) -> Array:
    """Return some rows of an array on a device, out of its parts here; where others have the same part, of one each."""
    first, last, _ = rows
    parts: dict[int, list[Any]] = {}
    for shard in x.addressable_shards:
        parts.setdefault(shard.index[0].start or 0, []).append(shard.data)
    found = []
    for start, same in sorted(parts.items()):
        part = same[copy % len(same)]
        low, high = max(first - start, 0), min(last - start, len(part))
        if low < high:
            found.append(jax.device_put(part if high - low == len(part) else part[low:high], device))
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def _key(k: Any) -> str:
    return str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))


def placement(config: MeshConfig, devices: Sequence[Any] | None = None) -> Placement:
    """Return the placement that a config asks for, over all visible devices unless given some."""
    devices = list(jax.devices() if devices is None else devices)
    others = {name: getattr(config, name) for name in AXES[1:]}
    if config.placement == "pmap" and set(others.values()) != {1}:
        raise UserError(
            f"mesh.placement pmap replicates the parameters; got {sizes_text(others)}, wanted 1 each (or placement jit)"
        )
    shape = config.shape(len(devices))
    # Split: an axis need not be whole axes of a TPU's network, as jax.make_mesh wants it on some.
    arranged = create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    # Auto: Explicit axes break Linen's Embed.
    return Placement(Mesh(arranged, tuple(shape), axis_types=(AxisType.Auto,) * len(shape)), config.placement)


def placements(config: MeshConfig, teacher: TeacherMeshConfig, devices: Sequence[Any] | None = None):
    """Return the placements of student and teacher: the same one, unless the teacher has a mesh of its own.

    Raises:
        UserError: meshes that cannot be, or that lay rows of one process on another.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not teacher.devices:
        return (both := placement(config, devices)), both
    if config.placement == "pmap":
        raise UserError(
            "mesh.placement is pmap, where the teacher runs within the step; set it to jit, or leave out teacher_mesh"
        )
    of_process: dict[int, list[Any]] = {}
    for device in devices:
        of_process.setdefault(device.process_index, []).append(device)
    own, fewest = teacher.devices // len(of_process), min(map(len, of_process.values()))
    if teacher.devices == -1:
        students, teachers = devices, devices
    elif teacher.devices % len(of_process) or own >= fewest:
        raise UserError(
            f"teacher_mesh.devices is {teacher.devices} of {len(devices)}; wanted a multiple of the "
            f"{len(of_process)} processes, and at least one device of each left for the student"
        )
    else:
        students = [device for some in of_process.values() for device in some[:-own]]
        teachers = [device for some in of_process.values() for device in some[-own:]]
    student, its = placement(config, students), placement(teacher, teachers)
    if student.reading != its.reading:
        raise UserError(
            f"a teacher's mesh of {sizes_text(dict(its.mesh.shape))} lays rows on other processes than the student's "
            f"of {sizes_text(dict(student.mesh.shape))}; let context * tensor of each divide its devices of a process"
        )
    return student, its
