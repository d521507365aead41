"""What sums over the vocabulary are made of: terms that stay exact in float32 near equality and far from it.

Where two models nearly agree, Σ p·log(p/q) in float32 is noise. The terms here have what sums to zero added, so that
each is non-negative and small by itself. Where they are far apart, nothing overflows: all is exps of negative numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kdjax.shapes import Array

SumV = Callable[[Array], Array]
"""x_NV -> x_N: reduced over the vocabulary, whose parts may lie on several devices."""
TINY = 1e-30
"""A parameter below it is 0: its product with a small d would underflow."""


def kl_terms(p_log_NV: Array, q_log_NV: Array) -> Array:
    """Return the terms of KL(p ‖ q), each non-negative: p·(d + expm1(−d)) with d = log p − log q.

    They sum to Σ p·d, since Σ (q − p) = 0, but cancel nothing: Σ p·d in float32 is off by 35 % at a KL of 5e-7 and
    negative at 5e-9. Where |d| is large the same terms are p·d + (q − p), which cannot overflow.
    """
    p_NV, q_NV, d_NV = jnp.exp(p_log_NV), jnp.exp(q_log_NV), p_log_NV - q_log_NV
    near_NV = jnp.abs(d_NV) < 0.5
    d_near_NV = jnp.where(near_NV, d_NV, 0.0)
    return jnp.where(near_NV, p_NV * (d_near_NV + jnp.expm1(-d_near_NV)), p_NV * d_NV + (q_NV - p_NV))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def mixture_terms(p_log_NV: Array, q_log_NV: Array, share: float, p_weight: float, q_weight: float):
    """Return the terms of p_weight·KL(p ‖ m) + q_weight·KL(q ‖ m) with m = share·p + (1 − share)·q, in two forms.

    The first is as the textbook has it, p_weight·p·log(p/m) + q_weight·q·log(q/m). The second has p_weight·(m − p) +
    q_weight·(m − q) added, which sums to zero and leaves each term non-negative. 0 < share < 1.

    The derivative is written by hand: differentiating what follows would keep twice as many [N, V] arrays.
    """
    return _mixture(p_log_NV, q_log_NV, share, p_weight, q_weight)[0]


def _mixture(p_log_NV: Array, q_log_NV: Array, share: float, p_weight: float, q_weight: float):
    """Return both forms, and log(p/m), log(q/m), (q − p)/m, p and q.

    All is reckoned from the larger of p and q: with r = smaller/larger and c the smaller one's share of m,
    m/larger = 1 + x with x = c·(r − 1), which lies between 1 − c and 1: its log neither overflows nor meets 0. Near
    equality KL(· ‖ m) is x − log(1 + x) with x = m/· − 1, for each of the two by its own x, so that what is of first
    order in d cancels exactly.
    """
    p_leads_NV, gap_NV = p_log_NV > q_log_NV, jnp.abs(p_log_NV - q_log_NV)
    top_NV = jnp.exp(jnp.maximum(p_log_NV, q_log_NV))
    share_top_NV, share_low_NV = jnp.where(p_leads_NV, share, 1 - share), jnp.where(p_leads_NV, 1 - share, share)
    weight_top_NV = jnp.where(p_leads_NV, p_weight, q_weight)
    weight_low_NV = jnp.where(p_leads_NV, q_weight, p_weight)
    fall_NV = jnp.expm1(-gap_NV)
    ratio_NV = 1 + fall_NV
    x_top_NV, whole_NV = share_low_NV * fall_NV, share_top_NV + share_low_NV * ratio_NV
    log_top_NV = _log_one_plus(x_top_NV, whole_NV)
    raw_NV = -(weight_top_NV * log_top_NV + weight_low_NV * ratio_NV * (log_top_NV + gap_NV))
    far_NV = raw_NV + fall_NV * (weight_top_NV * share_low_NV - weight_low_NV * share_top_NV)
    is_near_NV = gap_NV < 0.5
    x_low_NV = -share_top_NV * fall_NV / jnp.where(is_near_NV, ratio_NV, 1.0)
    log_low_NV = jnp.where(is_near_NV, jnp.log1p(x_low_NV), log_top_NV + gap_NV)
    near_NV = weight_top_NV * (x_top_NV - log_top_NV) + weight_low_NV * ratio_NV * (x_low_NV - log_low_NV)
    forms = top_NV * raw_NV, top_NV * jnp.maximum(jnp.where(is_near_NV, near_NV, far_NV), 0.0)
    p_gap_NV, q_gap_NV = (-jnp.where(leads, log_top_NV, log_low_NV) for leads in (p_leads_NV, ~p_leads_NV))
    change_NV = jnp.where(p_leads_NV, fall_NV, -fall_NV) / whole_NV
    p_NV, q_NV = (top_NV * jnp.where(leads, 1.0, ratio_NV) for leads in (p_leads_NV, ~p_leads_NV))
    return forms, (p_gap_NV, q_gap_NV, change_NV, p_NV, q_NV)


def _mixture_jvp(share, p_weight, q_weight, primals, tangents):
    """Return both forms and their change, by these slopes with k = p_weight·(1 − share) − q_weight·share.

    Of the second form p·(p_weight·log(p/m) + share·k·(q − p)/m) by log p and q·(q_weight·log(q/m) + (1 − share)·k·
    (q − p)/m) by log q; of the first, which is the second − k·(q − p), p·k more and q·k less.
    """
    forms, (p_gap_NV, q_gap_NV, change_NV, p_NV, q_NV) = _mixture(primals[0], primals[1], share, p_weight, q_weight)
    k, slopes = p_weight * (1 - share) - q_weight * share, [jnp.zeros_like(p_NV), jnp.zeros_like(p_NV)]
    sides = ((p_NV, p_weight * p_gap_NV, share, k), (q_NV, q_weight * q_gap_NV, 1 - share, -k))
    for (mass_NV, gap_NV, own_share, more), tangent_NV in zip(sides, tangents, strict=True):
        if isinstance(tangent_NV, SymbolicZero):
            continue
        slope_NV = gap_NV + own_share * k * change_NV
        slopes[0] = slopes[0] + mass_NV * (slope_NV + more) * tangent_NV
        slopes[1] = slopes[1] + mass_NV * slope_NV * tangent_NV
    return forms, tuple(slopes)


mixture_terms.defjvp(_mixture_jvp, symbolic_zeros=True)


def _log_one_plus(x_NV: Array, far_NV: Array) -> Array:
    """Return log(1 + x) for −1 < x <= 0; `far_NV` is 1 + x by a way that is exact where x is near −1."""
    near_NV = x_NV > -0.5
    y_NV = jnp.where(near_NV, 1 + x_NV, far_NV)
    lost_NV = jnp.where(near_NV, x_NV - (y_NV - 1), 0.0)  # what rounding 1 + x lost, to first order
    return jnp.log(y_NV) + lost_NV / y_NV


def jeffreys_terms(p_log_NV: Array, q_log_NV: Array) -> Array:
    """Return (p − q)·(log p − log q), each non-negative: larger·(1 − r)·|d| with r = smaller/larger = exp(−|d|)."""
    gap_NV = jnp.abs(p_log_NV - q_log_NV)
    return jnp.exp(jnp.maximum(p_log_NV, q_log_NV)) * gap_NV * -jnp.expm1(-gap_NV)


def alpha_beta_terms(p_log_NV: Array, q_log_NV: Array, alpha: float, beta: float) -> Array:
    """Return p^(α+β)/(β(α+β)) + q^(α+β)/(α(α+β)) − p^α·q^β/(αβ), each non-negative, with all limits for α, β >= 0.

    With d = log p − log q, s = α + β and φ_c(d) = (exp(−c·d) − 1)/c, which is −d at c = 0, the term is
    p^s·(φ_s(d) − φ_β(d))/α. Near d = 0 that is a power series without any division, which alone has the limits;
    further off, the same from the larger of p and q, so that every exponent is negative. α and β change places with
    p and q, so the division is always by the larger of them; at α = β = 0 the term is d²/2.
    """
    if alpha < beta:
        return alpha_beta_terms(q_log_NV, p_log_NV, beta, alpha)
    total, d_NV = alpha + beta, p_log_NV - q_log_NV
    if total < TINY:
        return 0.5 * jnp.square(d_NV)
    near_NV = total * jnp.abs(d_NV) < 0.5
    d_near_NV, gap_NV = jnp.where(near_NV, d_NV, 0.0), jnp.abs(d_NV)
    near_terms_NV = jnp.exp(total * p_log_NV) * _alpha_beta_series(d_near_NV, alpha, beta)

    def reach(c: float) -> Array:  # (1 − exp(−c·gap))/c
        return gap_NV if c < TINY else -jnp.expm1(-c * gap_NV) / c

    p_leads_NV = reach(beta) - reach(total)
    q_leads_NV = reach(total) - jnp.exp(-alpha * gap_NV) * reach(beta)
    top_NV = jnp.exp(total * jnp.maximum(p_log_NV, q_log_NV))
    far_terms_NV = top_NV * jnp.where(d_NV > 0, p_leads_NV, q_leads_NV) / alpha
    return jnp.where(near_NV, near_terms_NV, far_terms_NV)


def _alpha_beta_series(d_NV: Array, alpha: float, beta: float) -> Array:
    """Return (φ_s(d) − φ_β(d))/α = Σ_k (−1)^(k+1)·d^(k+1)/(k+1)!·(s^k − β^k)/(s − β) for |s·d| < 0.5, to float32."""
    total, series_NV = alpha + beta, 0.0
    for k in range(9, 0, -1):
        quotient = sum(total**j * beta ** (k - 1 - j) for j in range(k))
        series_NV = (-1) ** (k + 1) * quotient / math.factorial(k + 1) + series_NV * d_NV
    return jnp.square(d_NV) * series_NV
