"""Who sees whom, and the attention kernel. Every kernel is a callable `(q_BTHK, k_BSGK, v_BSGK, sight) -> BTHK`.

A model takes such a callable as its field `attention`, so that one which works across devices can stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from kdjax import environment
from kdjax.errors import UserError
from kdjax.models.config import ModelConfig
from kdjax.shapes import Array

PREFIX_SEGMENT = -1
"""The segment of a prefix's slots, which real tokens of every segment see."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sight:
    """What each query may see, of its own segment, and how it scores that.

    Padding is segment 0 and sees itself like any other segment, so no row of the mask is empty and none gives NaN.

    Attributes:
        query_segment_BT: segments of the queries.
        key_segment_BS: segments of the keys; without cache or prefix, those of the queries.
        back_BTS: how many tokens a key lies before a query; negative where it comes after. B is 1 where all rows agree.
        mask_B1TS: all that a query may see; a kernel that goes by segments leaves it unread.
        bias_BHTS: added to the scores, float32; None is nothing.
        scale: factor on the scores; None is one over the root of the head width.
        soft_cap: c in ``c·tanh(score/c)``, or None.
    """

    query_segment_BT: Array
    key_segment_BS: Array
    back_BTS: Array
    mask_B1TS: Array
    bias_BHTS: Array | None = None
    scale: float | None = field(default=None, metadata={"static": True})
    soft_cap: float | None = field(default=None, metadata={"static": True})

    def within(self, window: Array | int) -> Sight:
        """Return the sight of what lies fewer than `window` tokens back, or ahead where that is seen."""
        return replace(self, mask_B1TS=self.mask_B1TS & (jnp.abs(self.back_BTS) < window)[:, None])

    def past_gists(self, is_gist_BT: Array) -> Sight:
        """Return the sight in which what follows a gist sees its places, and nothing that stands before them.

        The places see what stands before them, and one another as ever. A row may have several examples with a gist.
        Paper: Mu et al. 2023, Learning to Compress Prompts with Gist Tokens, arXiv:2304.08467, section 3.1.
        """
        passed_BT = jnp.cumsum(is_gist_BT, axis=1)
        same_BTS = passed_BT[:, :, None] == passed_BT[:, None, :]
        seen_BTS = same_BTS | is_gist_BT[:, :, None] | is_gist_BT[:, None, :]
        return replace(self, mask_B1TS=self.mask_B1TS & seen_BTS[:, None])

    def behind(self, position_BT: Array, slots: int) -> Sight:
        """Return the sight of the same queries with a prefix in so many slots before the keys: real ones see all of it.

        Distances to it go by `position_BT`, which counts from the prefix's first token, and not by slots.
        """
        is_real_BT, (rows, tokens) = self.query_segment_BT > 0, position_BT.shape
        back_BTP = position_BT[:, :, None] - jnp.arange(slots)[None, None]
        back_BTS = jnp.broadcast_to(self.back_BTS, (rows, tokens, self.back_BTS.shape[-1]))
        seen_B1TP = jnp.broadcast_to(is_real_BT[:, None, :, None], (rows, 1, tokens, slots))
        segment_BP = jnp.full((rows, slots), PREFIX_SEGMENT, jnp.int32)
        return replace(
            self,
            key_segment_BS=jnp.concatenate([segment_BP, self.key_segment_BS], axis=1),
            back_BTS=jnp.concatenate([back_BTP, back_BTS], axis=2),
            mask_B1TS=jnp.concatenate([seen_B1TP, self.mask_B1TS], axis=3),
        )


Attention = Callable[[Array, Array, Array, Sight], Array]


def see(query_segment_BT: Array, key_segment_BS: Array, first_slot: Array | int = 0, *, causal: bool = True) -> Sight:
    """Return the sight of queries that stand at `first_slot` and after among the keys; causal: of no key after them."""
    tokens, slots = query_segment_BT.shape[1], key_segment_BS.shape[1]
    back_TS = (first_slot + jnp.arange(tokens))[:, None] - jnp.arange(slots)[None, :]
    same_BTS = query_segment_BT[:, :, None] == key_segment_BS[:, None, :]
    seen_BTS = same_BTS & (back_TS >= 0)[None] if causal else same_BTS
    return Sight(query_segment_BT, key_segment_BS, back_TS[None], seen_BTS[:, None])


def attend(q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, sight: Sight) -> Array:
    """Return scaled dot-product attention, softmax in float32: cuDNN's flash kernel where it can, XLA elsewhere."""
    if sight.soft_cap is not None:
        return _capped(q_BTHK, k_BSGK, v_BSGK, sight, sight.soft_cap)
    implementation = "cudnn" if sight.bias_BHTS is None and _cudnn_can(q_BTHK, k_BSGK) else "xla"
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        bias=sight.bias_BHTS,
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
    return fits and q_BTHK.dtype == jnp.bfloat16 and environment.backend() == "gpu"


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Keys and values of P tokens that stand before every example of a row, as attention sees them (keys rotated).

    They count from position 0, what stands behind them from position P. Made of a prompt by `prefix_of`, or trained.

    Attributes:
        k_LBPGK: the keys of all layers; B is 1 where all rows have the same prefix.
        v_LBPGK: the values.
    """

    k_LBPGK: Array
    v_LBPGK: Array

    @property
    def tokens(self) -> int:
        """P."""
        return self.k_LBPGK.shape[2]

    def then(self, other: Prefix) -> Prefix:
        """Return the two one after the other, in the other's dtype."""

        def join(first_LBPGK: Array, second_LBPGK: Array) -> Array:
            rows = max(first_LBPGK.shape[1], second_LBPGK.shape[1])
            parts = [jnp.broadcast_to(x, (len(x), rows, *x.shape[2:])) for x in (first_LBPGK, second_LBPGK)]
            return jnp.concatenate([parts[0].astype(parts[1].dtype), parts[1]], axis=2)

        return jax.tree.map(join, self, other)

    def check(self, config: ModelConfig, rows: int) -> None:
        """Check that it is of such a model, for so many rows.

        Raises:
            UserError: it is not, or the model takes none.
        """
        config.check_prefix()
        c = config
        for name, array in (("keys", self.k_LBPGK), ("values", self.v_LBPGK)):
            got = tuple(array.shape)
            if got not in [(c.layers, batch, self.tokens, c.kv_heads, c.head_width) for batch in (1, rows)]:
                raise UserError(
                    f"the prefix's {name} have shape {got}; wanted [{c.layers} layers, 1 or {rows} rows, {self.tokens} "
                    f"tokens, {c.kv_heads} heads, {c.head_width} wide], as prefix_of makes them"
                )
