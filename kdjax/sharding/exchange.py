"""Attention over rows whose tokens lie on several devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kdjax.shapes import Array

Kernel = Callable[..., Array]
"""An attention kernel, ``kernel(q_BTHK, k_BSGK, v_BSGK, sight)``: `kdjax.models.attention.Attention`."""


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

    Attributes:
        place: a `Placement`, over whose mesh rows lie.
        kernel: what one device runs.
    """

    place: Any
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
