"""Who sees whom, and the attention kernel. Every kernel is a callable `(q_BTHK, k_BSGK, v_BSGK, sight) -> BTHK`.

A model takes such a callable as its field `attention`, so that one which works across devices can stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from kdjax.shapes import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sight:
    """What each query may see, of its own segment, and how it scores that.

    Padding is segment 0 and sees itself like any other segment, so no row of the mask is empty and none gives NaN.

    Attributes:
        query_segment_BT: segments of the queries.
        key_segment_BS: segments of the keys; without a cache, those of the queries.
        back_TS: how many slots a key lies before a query; negative where it comes after.
        mask_B1TS: all that a query may see; a kernel that goes by segments leaves it unread.
        bias_1HTS: added to the scores, float32; None is nothing.
        scale: factor on the scores; None is one over the root of the head width.
        soft_cap: c in ``c·tanh(score/c)``, or None.
    """

    query_segment_BT: Array
    key_segment_BS: Array
    back_TS: Array
    mask_B1TS: Array
    bias_1HTS: Array | None = None
    scale: float | None = field(default=None, metadata={"static": True})
    soft_cap: float | None = field(default=None, metadata={"static": True})

    def within(self, window: Array | int) -> Sight:
        """Return the sight of what lies fewer than `window` tokens back, or ahead where that is seen."""
        return replace(self, mask_B1TS=self.mask_B1TS & (jnp.abs(self.back_TS) < window)[None, None])


Attention = Callable[[Array, Array, Array, Sight], Array]


def see(query_segment_BT: Array, key_segment_BS: Array, first_slot: Array | int = 0, *, causal: bool = True) -> Sight:
    """Return the sight of queries that stand at `first_slot` and after among the keys; causal: of no key after them."""
    tokens, slots = query_segment_BT.shape[1], key_segment_BS.shape[1]
    back_TS = (first_slot + jnp.arange(tokens))[:, None] - jnp.arange(slots)[None, :]
    same_BTS = query_segment_BT[:, :, None] == key_segment_BS[:, None, :]
    seen_BTS = same_BTS & (back_TS >= 0)[None] if causal else same_BTS
    return Sight(query_segment_BT, key_segment_BS, back_TS, seen_BTS[:, None])


def attend(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, sight: Sight) -> Array:
    """Return scaled dot-product attention, softmax in float32: cuDNN's flash kernel where it can, XLA elsewhere."""
    if sight.soft_cap is not None:
        return _capped(q_BTHK, k_BSGK, v_BSGK, sight, sight.soft_cap)
    implementation = "cudnn" if sight.bias_1HTS is None and _cudnn_can(q_BTHK, k_BSGK) else "xla"
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        bias=sight.bias_1HTS,
        mask=sight.mask_B1TS,
        scale=sight.scale,
        implementation=implementation,
    )


def _capped(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, sight: Sight, soft_cap: float) -> Array:
    """Return attention with capped scores, which no kernel here has. Paper: Gemma 2, arXiv:2408.00118, section 2."""
    groups, head_width = k_BSGK.shape[2:]
    q_BTGMK = q_BTHK.reshape(*q_BTHK.shape[:2], groups, -1, head_width)
    scores = jnp.einsum("btgmk,bsgk->bgmts", q_BTGMK, k_BSGK, preferred_element_type=jnp.float32)
    scores = scores * (head_width**-0.5 if sight.scale is None else sight.scale)
    scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(sight.mask_B1TS[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("bgmts,bsgk->btgmk", weights, v_BSGK).reshape(q_BTHK.shape)


def _cudnn_can(q_BTHK: Array, k_BSGK: Array) -> bool:
    """Whether cuDNN takes these shapes on every GPU since Ampere (head widths above 128 need Hopper)."""
    tokens, slots, head_width = q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.shape[-1]
    fits = head_width <= 128 and head_width % 8 == 0 and tokens == slots and tokens % 2 == 0
    return fits and q_BTHK.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for decoding.

    Attributes:
        own: keys (as attention sees them, in the compute dtype) and values, each [L, B, S, G, K].
        segment_BS: the segment in each slot; 0 is padding or not filled yet.
        used: how many slots are filled, a scalar.
        encoder: keys and values of what the encoder said; None without an encoder, and before it has spoken.
        encoder_segment_BS: their segments.
    """

    own: tuple[Array, Array]
    segment_BS: Array
    used: Array
    encoder: tuple[Array, Array] | None = None
    encoder_segment_BS: Array | None = None
