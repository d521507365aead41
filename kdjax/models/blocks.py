"""What a Transformer's layer is made of: attention to itself, to an encoder, and the order of its residual branches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.models.attention import Attention, Prefix, Sight
from kdjax.models.config import ModelConfig
from kdjax.models.experts import Dispatch, Experts
from kdjax.models.layers import Layout, Linear, Mlp, Norm, branch_std, dropout
from kdjax.models.positions import rotate
from kdjax.shapes import Array

BRANCHES = ("attention", "cross", "mlp")
"""The residual branches of a layer, in order."""

NORMS = {"before": ("before",), "after": ("after",), "both": ("before", "after"), "sum": ("sum",)}
"""`ModelConfig.norms` -> the places at a branch that are normalised: its input, its output, its sum with the stream."""

_NAMES = {"before": "norm", "after": "after_norm", "sum": "sum_norm"}

_ALL = 2**30
"""A window that no text is as long as."""

Slots = tuple[Array, Array] | None
"""Keys and values in the cache: of all layers where tokens are added, of one where only read; None without a cache."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """What all layers of one call read."""

    sight: Sight
    waves: tuple[Array, Array] | None
    local_waves: tuple[Array, Array] | None
    """Of layers with a window, where these differ."""
    first_slot: Array | int
    row_keys_B: Array | None
    is_real_BT: Array
    encoded_BSD: Array | None
    """What the encoder says; None without an encoder, and where its keys and values are in the cache."""
    encoder_sight: Any
    """What of that each token sees; None without an encoder."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Own:
    """What a layer has of its own besides its parameters; None where all layers are alike. Stacked for the scan."""

    number: Array
    window: Array | None
    is_rotated: Array | None
    is_normed: Array | None
    prefix: Prefix | None = None
    """What stands before every example; one layer's has no axis L."""


class SelfAttention(nn.Module):
    """Grouped-query attention of a layer."""

    config: ModelConfig
    dtype: Any
    attention: Attention
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: Array, own: Own, shared: Shared, slots: Slots) -> tuple[Array, dict, Slots]:
        """Return the output, its queries, keys and values by name, and all layers' slots with these tokens added."""
        c = self.config
        seen = {name: projected(c, self.dtype, name, x_BTD) for name in "qkv"}
        if c.qk_norm != "none":
            over = 1 if c.qk_norm == "head" else 2
            seen |= {name: Norm(c, self.dtype, over, name=f"{name}_norm")(seen[name]) for name in ("q", "k")}
        waves, window = shared.waves, own.window
        if window is not None and shared.local_waves is not None:
            waves = jax.tree.map(partial(jnp.where, window > 0), shared.local_waves, waves)
        if own.is_rotated is not None and waves is not None:
            still = jnp.ones_like(waves[0]), jnp.zeros_like(waves[1])
            waves = jax.tree.map(partial(jnp.where, own.is_rotated), waves, still)
        if waves is not None:
            seen |= {name: rotate(seen[name], waves) for name in ("q", "k")}
        q_BTHK = self.layout(seen["q"], ("batch", "sequence", "heads", None))
        k_BSGK = self.layout(seen["k"], ("batch", "sequence", "kv_heads", None))
        v_BSGK = self.layout(seen["v"], ("batch", "sequence", "kv_heads", None))
        if slots is not None:
            at = own.number, 0, shared.first_slot, 0, 0
            slots = _put(slots[0], k_BSGK, at), _put(slots[1], v_BSGK, at)
            k_BSGK, v_BSGK = slots[0][own.number], slots[1][own.number]
        if own.prefix is not None:
            k_BSGK, v_BSGK = _behind(own.prefix.k_LBPGK, k_BSGK), _behind(own.prefix.v_LBPGK, v_BSGK)
        sight = shared.sight if window is None else shared.sight.within(jnp.where(window > 0, window, _ALL))
        y_BTHK = self.attention(q_BTHK, k_BSGK, v_BSGK, sight)
        return put_out(c, self.dtype, self.layout, y_BTHK), seen, slots


class CrossAttention(nn.Module):
    """Attention of a decoder's layer to what the encoder says."""

    config: ModelConfig
    dtype: Any
    attention: Attention
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: Array, shared: Shared, slots: Any) -> tuple[Array, Slots]:
        """Return the output, and the keys and values: of `slots`, unless the encoder has spoken in this call."""
        c = self.config
        q_BTHK = self.layout(projected(c, self.dtype, "q", x_BTD), ("batch", "sequence", "heads", None))
        if shared.encoded_BSD is not None:
            k_BSGK, v_BSGK = (projected(c, self.dtype, name, shared.encoded_BSD) for name in "kv")
            names = ("batch", "sequence", "kv_heads", None)
            slots = self.layout(k_BSGK, names), self.layout(v_BSGK, names)
        y_BTHK = self.attention(q_BTHK, slots[0], slots[1], shared.encoder_sight)
        return put_out(c, self.dtype, self.layout, y_BTHK), slots


def projected(c: ModelConfig, dtype: Any, name: str, x_BTD: Array) -> Array:
    """Return the queries, keys or values of `x_BTD`; to be called within a module's compact method."""
    heads = ("heads", c.heads) if name == "q" else ("kv_heads", c.kv_heads)
    return Linear((("embed", c.width),), (heads, ("head_width", c.head_width)), c.qkv_bias, dtype, name=name)(x_BTD)


def put_out(c: ModelConfig, dtype: Any, layout: Layout, y_BTHK: Array) -> Array:
    """Return what all heads say together, [B, T, D]; to be called within a module's compact method."""
    heads = (("heads", c.heads), ("head_width", c.head_width))
    y_BTHK = layout(y_BTHK, ("batch", "sequence", "heads", None))
    return Linear(heads, (("embed", c.width),), c.out_bias, dtype, branch_std(c), name="out")(y_BTHK)


def _put(old_LBSGK: Array, new_BTGK: Array, at: tuple[Array | int, ...]) -> Array:
    """Return the slots of all layers with the new tokens in one of them: in place, where the old ones are not kept."""
    return jax.lax.dynamic_update_slice(old_LBSGK, new_BTGK[None].astype(old_LBSGK.dtype), at)


def _behind(prefix_BPGK: Array, x_BSGK: Array) -> Array:
    """Return the prefix's keys or values with the row's own after them."""
    first_BPGK = jnp.broadcast_to(prefix_BPGK, (x_BSGK.shape[0], *prefix_BPGK.shape[1:]))
    return jnp.concatenate([first_BPGK.astype(x_BSGK.dtype), x_BSGK], axis=1)


class Layer(nn.Module):
    """One layer: attention to itself, in a decoder with an encoder also to that, and mlp; each a residual branch."""

    config: ModelConfig
    dtype: Any
    attention: Attention
    layout: Layout
    dispatch: Dispatch
    taps: tuple[str, ...]

    @nn.compact
    def __call__(self, carry: tuple[Array, Slots], own: Own, encoder_slots: Slots, shared: Shared) -> tuple:
        """Return the scan's carry (residual stream and cache), and the layer's taps, encoder slots and further sums."""
        c, (x_BTD, slots) = self.config, carry
        first_BTD = x_BTD
        parts = c, self.dtype, self.attention, self.layout
        attention, cross = SelfAttention(*parts, name="attention"), CrossAttention(*parts, name="cross")
        read_BTD = self._normed("before", "attention", x_BTD)
        read_BTD = read_BTD if own.is_normed is None else jnp.where(own.is_normed, read_BTD, x_BTD)
        h_BTD, seen, slots = attention(read_BTD, own, shared, slots)
        x_BTD = self._added("attention", x_BTD, h_BTD, own, shared)
        if c.encoder_layers:
            h_BTD, encoder_slots = cross(self._normed("before", "cross", x_BTD), shared, encoder_slots)
            x_BTD = self._added("cross", x_BTD, h_BTD, own, shared)
        h_BTD, aux = self._mlp(self._normed("before", "mlp", first_BTD if c.parallel else x_BTD), shared)
        x_BTD = self.layout(self._added("mlp", x_BTD, h_BTD, own, shared), ("batch", "sequence", None))
        seen["hidden"] = x_BTD
        encoder_slots = None if slots is None else encoder_slots
        return (x_BTD, slots), ({name: seen[name] for name in self.taps}, encoder_slots, aux)

    def _mlp(self, x_BTD: Array, shared: Shared) -> tuple[Array, dict[str, Array]]:
        c = self.config
        if not c.experts:
            return Mlp(c, self.dtype, self.layout, name="mlp")(x_BTD), {}
        scores_BTE = Linear((("embed", c.width),), ((None, c.experts),), False, self.dtype, name="router")(x_BTD)
        return Experts(c, self.dtype, self.dispatch, name="experts")(x_BTD, scores_BTE, shared.is_real_BT)

    def _added(self, branch: str, x_BTD: Array, h_BTD: Array, own: Own, shared: Shared) -> Array:
        """Return the residual stream with what a branch gives."""
        site = 1 + len(BRANCHES) * own.number + BRANCHES.index(branch)
        h_BTD = dropout(self._normed("after", branch, h_BTD), shared.row_keys_B, site, self.config.dropout)
        return self._normed("sum", branch, x_BTD + h_BTD)

    def _normed(self, place: str, branch: str, x_BTD: Array) -> Array:
        """Return x, normalised if there is a norm at this place of the branch."""
        is_there = place in NORMS[self.config.norms]
        return Norm(self.config, self.dtype, name=f"{branch}_{_NAMES[place]}")(x_BTD) if is_there else x_BTD
