"""What can be compared with a teacher of another tokenizer: projected or sorted probabilities, or whole chunks."""

from __future__ import annotations

import jax.numpy as jnp

from kdjax.losses.terms import kl_terms
from kdjax.shapes import Array

SMALLEST = 1e-37
"""What a projected probability of 0 counts as: about the least that float32 holds."""

CERTAIN = -1e-6
"""The log-probability above which a chunk counts as certain, since float32 rounds sums to more than 0."""


def sorted_distance(student_NV: Array, teacher_NU: Array) -> Array:
    """Return Σ_i |p_(i) − q_(i)| over the probabilities of each, both sorted falling, the shorter filled up with 0.

    Paper: Boizard et al. 2024, ULD, arXiv:2402.12030, equation 4.
    """
    width = max(student_NV.shape[1], teacher_NU.shape[1])
    q_NV, p_NV = (
        jnp.sort(jnp.pad(jnp.exp(x), ((0, 0), (0, width - x.shape[1]))), axis=1) for x in (student_NV, teacher_NU)
    )
    return jnp.sum(jnp.abs(p_NV - q_NV), axis=1)


def chunk_divergence(student_N: Array, teacher_N: Array, tau: float = 100.0) -> Array:
    """Return τ·KL(Bernoulli(p^(1/τ)) ‖ Bernoulli(q^(1/τ))) of chunks whose log-probabilities are given.

    The factor τ keeps the gradient's size: as τ grows the value goes to a·log(a/b) − a + b with a = −log p and
    b = −log q. Paper: Minixhofer et al. 2025, ALM, arXiv:2503.20083, section 3.
    """
    log_q_N2, log_p_N2 = (_both_ways(jnp.minimum(x_N, CERTAIN) / tau) for x_N in (student_N, teacher_N))
    return tau * jnp.sum(kl_terms(log_p_N2, log_q_N2), axis=-1)


def _both_ways(log_N: Array) -> Array:
    """Return (log x, log(1 − x)) of log x < 0."""
    is_near_N = log_N > -0.7
    near_N, far_N = jnp.where(is_near_N, log_N, -1.0), jnp.where(is_near_N, -1.0, log_N)
    return jnp.stack([log_N, jnp.where(is_near_N, jnp.log(-jnp.expm1(near_N)), jnp.log1p(-jnp.exp(far_N)))], axis=-1)


def projected(teacher_NU: Array, student_of_U: Array, columns: int) -> Array:
    """Return the teacher's log-probabilities over the student's entries, each the sum of those that count as it.

    Args:
        teacher_NU: log-probabilities over its own vocabulary.
        student_of_U: the student's entry that each of the teacher's counts as.
        columns: of the student's logits.
    """
    mass_NV = jnp.zeros((len(teacher_NU), columns)).at[:, student_of_U].add(jnp.exp(teacher_NU), mode="drop")
    return jnp.log(jnp.maximum(mass_NV, SMALLEST))
