"""Divergences between teacher and student, one small pure function a paper.

Each is ``f(student_NV, teacher_NV, sum_V) -> loss_N`` over log-probabilities. It never reduces over V itself: `sum_V`
is given, and is a plain sum or one joined over devices that hold parts of the vocabulary. To add one: write the
function and give it a row in `DIVERGENCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from kdjax.shapes import Array

SumV = Callable[[Array], Array]


class Divergence(NamedTuple):
    """A row of `DIVERGENCES`."""

    function: Callable[[Array, Array, SumV], Array]
    factor: Callable[[float], float]
    """What the loss is multiplied by at temperature T, so that its gradient keeps its size as T grows."""


def squared(temperature: float) -> float:
    """Return T²: the factor of KL-like divergences (Hinton et al. 2015, arXiv:1503.02531, section 2.1)."""
    return temperature * temperature


def kl_terms(p_log_NV: Array, q_log_NV: Array) -> Array:
    """Return the terms of KL(p ‖ q), each non-negative: p·(d + expm1(−d)) with d = log p − log q.

    They sum to Σ p·d, since Σ (q − p) = 0, but cancel nothing: Σ p·d in float32 is off by 35 % at a KL of 5e-7 and
    negative at 5e-9. Where |d| is large the same terms are p·d + (q − p), which cannot overflow.
    """
    p_NV, q_NV, d_NV = jnp.exp(p_log_NV), jnp.exp(q_log_NV), p_log_NV - q_log_NV
    near_NV = jnp.abs(d_NV) < 0.5
    d_near_NV = jnp.where(near_NV, d_NV, 0.0)
    return jnp.where(near_NV, p_NV * (d_near_NV + jnp.expm1(-d_near_NV)), p_NV * d_NV + (q_NV - p_NV))


def forward_kl(student_NV: Array, teacher_NV: Array, sum_V: SumV) -> Array:
    """Return KL(p_teacher ‖ p_student) = Σ p_t·(log p_t − log p_s): covers all that the teacher does.

    Gradient with respect to the student's tempered logits: p_s − p_t. Range [0, ∞).
    Paper: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """
    return sum_V(kl_terms(teacher_NV, student_NV))


def reverse_kl(student_NV: Array, teacher_NV: Array, sum_V: SumV) -> Array:
    """Return KL(p_student ‖ p_teacher) = Σ p_s·(log p_s − log p_t): seeks the teacher's modes.

    Gradient with respect to the student's tempered logits: p_s·(d − Σ p_s·d), d = log p_s − log p_t. Range [0, ∞).
    Paper: Gu et al. 2023, MiniLLM, arXiv:2306.08543, eq. 2.
    """
    return sum_V(kl_terms(student_NV, teacher_NV))


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl, squared),
    "reverse_kl": Divergence(reverse_kl, squared),
}
