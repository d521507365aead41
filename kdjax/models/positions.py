"""How a token's place enters the model: rotary angles on queries and keys, waves added to embeddings, biases on scores.

What is learned (an `Embedding` of positions, T5's `RelativeBias`) is a module of `kdjax.models.layers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from kdjax.models.config import Rope
from kdjax.shapes import Array


def rope_waves(position_BT: Array, segment_BT: Array, head_width: int, rope: Rope) -> tuple[Array, Array]:
    """Return cosine and sine of every rotary angle, float32, [B, T, 1, K/2]: one axis kept for the heads.

    Angle j at position t is ``t · theta^(-2j/K)``, its frequency scaled as a row of `SCALINGS` says; both waves are
    multiplied by `rope.attention_factor`. K is the part of the head's width that is rotated.
    Paper: Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 15.
    """
    rotated = rope.width(head_width)
    exponent = -jnp.arange(0, rotated, 2, dtype=jnp.float32)[None, None] / rotated
    frequency = SCALINGS[rope.scaling](rope, exponent, _length(position_BT, segment_BT)[:, :, None])
    angle = position_BT[:, :, None].astype(jnp.float32) * frequency
    return rope.attention_factor * jnp.cos(angle)[:, :, None], rope.attention_factor * jnp.sin(angle)[:, :, None]


def rotate(x_BTHK: Array, waves: tuple[Array, Array]) -> Array:
    """Return queries or keys turned by their positions, in their own dtype; dimension j is paired with j + K/2.

    What there is beyond the width that the waves are for is left as it is.
    """
    cos, sin = waves
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BTHK.astype(jnp.float32), (half, 2 * half), axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_BTHK.dtype)


def sinusoids(position_BT: Array, width: int) -> Array:
    """Return what is added to the embeddings, float32, [B, T, D]: sine and cosine of each frequency, in turn.

    Paper: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = position_BT[:, :, None].astype(jnp.float32) * frequency[None, None]
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return pairs.reshape(*position_BT.shape, -1)[:, :, :width]


def alibi(heads: int, back_BTS: Array) -> Array:
    """Return biases on scores that fall with distance, by a slope of each head, float32, [B, H, T, S].

    Slopes are 2^(-8h/n) for n heads, a power of two; for other numbers those of the power below, and of twice that
    every second one. Paper: Press et al. 2021, ALiBi, arXiv:2108.12409, section 3 and its code.
    """

    def slopes(count: int) -> list[float]:
        return [2.0 ** (-8 * (head + 1) / count) for head in range(count)]

    power = 2 ** int(math.log2(heads))
    of_head = jnp.array(slopes(power) + slopes(2 * power)[::2][: heads - power], jnp.float32)
    return -(of_head[None, :, None, None] * jnp.abs(back_BTS)[:, None].astype(jnp.float32))


def relative_buckets(back_BTS: Array, buckets: int, distance: int, causal: bool) -> Array:
    """Return the bucket of each distance: one each for short ones, ever wider ones up to `distance` and beyond.

    Without the causal half the buckets' second half is for keys that come after.
    Source: Raffel et al. 2019, T5, arXiv:1910.10683, section 2.1, and its code.
    """
    first_BTS = jnp.zeros_like(back_BTS)
    if not causal:
        buckets //= 2
        first_BTS = jnp.where(back_BTS < 0, buckets, 0)
    back_BTS = jnp.maximum(back_BTS, 0) if causal else jnp.abs(back_BTS)
    exact = buckets // 2
    ratio_BTS = jnp.log(jnp.maximum(back_BTS, 1).astype(jnp.float32) / exact) / math.log(distance / exact)
    wide_BTS = jnp.minimum(exact + (ratio_BTS * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return first_BTS + jnp.where(back_BTS < exact, back_BTS, wide_BTS)


def _length(position_BT: Array, segment_BT: Array) -> Array:
    """Return how long the segment is that each token stands in, as far as it is seen."""
    same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    return 1 + jnp.max(jnp.where(same_BTT, position_BT[:, None, :], 0), axis=-1)


def _none(rope: Rope, exponent: Array, length_BT1: Array) -> Array:
    """Return the frequencies of the base itself, [1, 1, K/2]."""
    return rope.theta**exponent


def _linear(rope: Rope, exponent: Array, length_BT1: Array) -> Array:
    """Return all of them divided by the factor. Paper: Chen et al. 2023, Position Interpolation, arXiv:2306.15595."""
    return _none(rope, exponent, length_BT1) / rope.factor


def _dynamic(rope: Rope, exponent: Array, length_BT1: Array) -> Array:
    """Return those of a base that grows with the text once it is longer than `made_for`, [B, T, K/2].

    Each packed text goes by its own length. While one is being generated, what is in the cache keeps the angles it had.
    Source: bloc97 and emozilla 2023, dynamic NTK scaling, as in Peng et al. 2023, YaRN, arXiv:2309.00071, section 3.3.
    """
    k = 2 * exponent.shape[-1]
    ratio_BT1 = jnp.maximum(length_BT1, rope.made_for).astype(jnp.float32) / rope.made_for
    return (rope.theta * (rope.factor * ratio_BT1 - (rope.factor - 1)) ** (k / (k - 2))) ** exponent


def _llama3(rope: Rope, exponent: Array, length_BT1: Array) -> Array:
    """Return slow waves stretched whole, fast ones not, and those between in part, by turns in `made_for` positions.

    Paper: Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv:2407.21783; the bounds are of Llama 3.1's code.
    """
    frequency = _none(rope, exponent, length_BT1)
    turns = rope.made_for * frequency / (2 * math.pi)
    kept = jnp.clip((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0, 1)
    return kept * frequency + (1 - kept) * frequency / rope.factor


def _yarn(rope: Rope, exponent: Array, length_BT1: Array) -> Array:
    """Return the same with a ramp over the numbers of the waves. Paper: Peng et al. 2023, YaRN, arXiv:2309.00071."""
    frequency, waves = _none(rope, exponent, length_BT1), exponent.shape[-1]

    def number(turns: float) -> float:
        """Return which wave turns so often in `made_for` positions."""
        return waves * math.log(rope.made_for / (turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = number(rope.beta_fast), number(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * waves - 1)
    stretched = jnp.clip((jnp.arange(waves)[None, None] - first) / ((last - first) or 0.001), 0, 1)
    return (1 - stretched) * frequency + stretched * frequency / rope.factor


SCALINGS: dict[str, Callable[[Rope, Array, Array], Array]] = {
    "none": _none,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
"""``f(rope, exponent, length_BT1)`` -> frequencies that broadcast to [B, T, K/2]; the exponents are −2j/K."""
