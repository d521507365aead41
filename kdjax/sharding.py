"""The mesh, the table logical axis -> mesh axes, and the placement of the one step by jit or by pmap.

The only file that builds meshes and calls shard_map. A model names its axes; the tables here say where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import lcm, prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.errors import UserError
from kdjax.shapes import Array, Axes

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that hold different examples."""

AXES = (*BATCH_AXES, "context", "tensor")
"""All of them; those along the last ones share examples, so they lie nearest to each other."""

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


Kernel = Callable[..., Array]
"""An attention kernel, ``kernel(q_BTHK, k_BSGK, v_BSGK, sight)``: `kdjax.models.attention.Attention`."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; -1 takes all that are left (at most one axis)."""

    placement: Literal["jit", "pmap"] = "jit"
    """`jit` on a mesh of any shape, or `pmap`: replicated data parallelism for models that fit one device."""
    data: int = -1
    """Copies of the parameters, each with its own examples."""
    fsdp: int = 1
    """Parameters split over devices that also have their own examples."""
    expert: int = 1
    """Experts split over devices that also have their own examples; all other parameters are copied to each."""
    context: int = 1
    """Tokens of each row split over devices that share examples, for rows too long for one."""
    tensor: int = 1
    """Heads, mlp and vocabulary split over devices that share examples."""

    def shape(self, devices: int) -> dict[str, int]:
        """Return the size of each mesh axis on so many devices.

        Raises:
            UserError: sizes that cannot fill them, with a mesh that can.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        bad = {name: size for name, size in sizes.items() if size < 1 and size != -1}
        if bad:
            raise UserError(f"mesh sizes {bad}; wanted at least 1 each, or -1 for all devices that are left")
        open_axes = [name for name, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise UserError(f"mesh.{' and mesh.'.join(open_axes)} are -1; only one axis can take what is left")
        known = prod(size for size in sizes.values() if size != -1)
        if devices % known or (not open_axes and known != devices):
            fill = ", ".join(f"{name}={-1 if name == 'data' else max(1, sizes[name])}" for name in sizes)
            raise UserError(
                f"a mesh of {_text(sizes)} does not fill {devices} devices; "
                + (
                    f"use {fill}"
                    if devices % prod(s for n, s in sizes.items() if n != "data" and s > 0) == 0
                    else f"{' * '.join(AXES[1:])} must divide {devices}"
                )
            )
        return {name: devices // known if size == -1 else size for name, size in sizes.items()}


def _text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


@dataclass(frozen=True)
class Placement:
    """Where arrays lie and how functions run: the step itself knows nothing of it."""

    mesh: Mesh
    by: Literal["jit", "pmap"]

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
                f"a mesh of {_text(dict(self.mesh.shape))} lays examples across the borders of {len(of_process)} "
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
            parts = f"{self.batch_devices} devices ({_text(dict(self.mesh.shape))})"
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
            return NamedSharding(self.mesh, P())
        return NamedSharding(self.mesh, P(*(self._axes(name, size) for name, size in zip(names, shape, strict=True))))

    def _axes(self, name: str | None, size: int) -> str | tuple[str, ...] | None:
        axes = RULES.get(name) if name else None
        total = prod(self.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        return axes if total > 1 and size % total == 0 else None

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds all of it."""
        return NamedSharding(self.mesh, P())

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


@dataclass(frozen=True)
class Exchanged:
    """An attention kernel for rows whose tokens lie on several devices: each takes all tokens of some of the heads.

    Queries, keys and values are exchanged all to all, the kernel runs as on one device, and its output goes back. So it
    may be any kernel, flash ones too, and segments, windows, prefixes, biases and caps are in what it sees as ever;
    each device also does as much as the others. In a ring, where keys travel past queries that stay, the kernel would
    be another one, which treats each of these block by block, and under a causal mask the last device works most. The
    price: the query heads must split over the devices (`Placement.check_context`). Key/value heads that do not are
    repeated as often as it takes.
    Paper: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv:2309.14509, section 3.
    """

    place: Placement
    kernel: Kernel

    def __call__(self, q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, sight: Any) -> Array:
        """Return ``kernel(q_BTHK, k_BSGK, v_BSGK, sight)``; what does not split, as a single token, stays."""
        context, tensor = self.place.mesh.shape["context"], self.place.mesh.shape["tensor"]
        if q_BTHK.shape[1] % context or q_BTHK.shape[2] % (context * tensor):
            return self.kernel(q_BTHK, k_BSGK, v_BSGK, sight)

        def spec(x: Array, *names: str | None) -> P:
            return self.place.sharding((*names, *[None] * (x.ndim - len(names))), x.shape).spec

        repeats = lcm(k_BSGK.shape[2], context * tensor) // k_BSGK.shape[2]
        # Repeated where its tokens lie: the partitioner would gather them before it shares the heads out.
        k_BSGK, v_BSGK = (
            self.place.constrain(jnp.repeat(x, repeats, axis=2), ("batch", "sequence", "heads", None))
            for x in (k_BSGK, v_BSGK)
        )
        of_heads = spec(q_BTHK, "batch", None, "exchanged_heads")
        of_sight = jax.tree.map(lambda x: spec(x, "batch", *["exchanged_heads"] * (x.ndim == 4)), sight)
        specs = (of_heads, of_heads, of_heads, of_sight)
        # check_vma=False: as in shard_loss.
        run = jax.shard_map(self.kernel, mesh=self.place.mesh, in_specs=specs, out_specs=of_heads, check_vma=False)
        return run(q_BTHK, k_BSGK, v_BSGK, sight)


def _key(k: Any) -> str:
    return str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))


def placement(config: MeshConfig, devices: Sequence[Any] | None = None) -> Placement:
    """Return the placement that a config asks for, over all visible devices unless given some."""
    devices = list(jax.devices() if devices is None else devices)
    others = {name: getattr(config, name) for name in AXES[1:]}
    if config.placement == "pmap" and set(others.values()) != {1}:
        raise UserError(
            f"mesh.placement pmap replicates the parameters; got {_text(others)}, wanted 1 each (or placement jit)"
        )
    shape = config.shape(len(devices))
    # Split: an axis need not be whole axes of a TPU's network, as jax.make_mesh wants it on some.
    arranged = create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    # Auto: Explicit axes break Linen's Embed.
    return Placement(Mesh(arranged, tuple(shape), axis_types=(AxisType.Auto,) * len(shape)), config.placement)
