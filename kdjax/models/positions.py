"""How a token's place enters the model: rotary angles on queries and keys (learned positions are an `Embedding`)."""

from __future__ import annotations

import jax.numpy as jnp

from kdjax.shapes import Array


def rope_waves(position_BT: Array, head_width: int, theta: float) -> tuple[Array, Array]:
    """Return cosine and sine of every rotary angle, float32, [B, T, 1, K/2]: one axis kept for the heads.

    Angle j at position t is ``t · theta^(-2j/K)``. Paper: Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 15.
    """
    frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = position_BT[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: Array, waves: tuple[Array, Array]) -> Array:
    """Return queries or keys turned by their positions, in their own dtype; dimension j is paired with j + K/2."""
    cos, sin = waves
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)
