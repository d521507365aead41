"""Divergences that are one sum over the vocabulary, each a small pure function beside the terms that it sums.

``f(student_NV, teacher_NV, sum_V) -> loss_N`` is over log-probabilities (`mse`: over logits). ``NAME_terms`` gives the
textbook's terms [N, V]; of mixtures a pair, these and the non-negative ones that the loss sums.
"""

from __future__ import annotations

import jax.numpy as jnp

from kdjax.losses.terms import SumV, alpha_beta_terms, jeffreys_terms, kl_terms, mixture_terms
from kdjax.shapes import Array


def forward_kl(student_NV: Array, teacher_NV: Array, sum_V: SumV) -> Array:
    """Return KL(p_teacher ‖ p_student) = Σ p_t·(log p_t − log p_s): covers all that the teacher does.

    Gradient with respect to the student's tempered logits: p_s − p_t. Range [0, ∞).
    Paper: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """
    return sum_V(kl_terms(teacher_NV, student_NV))


def forward_kl_terms(student_NV: Array, teacher_NV: Array) -> Array:
    """Return p_t·(log p_t − log p_s)."""
    return jnp.exp(teacher_NV) * (teacher_NV - student_NV)


def reverse_kl(student_NV: Array, teacher_NV: Array, sum_V: SumV) -> Array:
    """Return KL(p_student ‖ p_teacher) = Σ p_s·(log p_s − log p_t): seeks the teacher's modes.

    Gradient with respect to the student's tempered logits: p_s·(d − Σ p_s·d), d = log p_s − log p_t. Range [0, ∞).
    Paper: Gu et al. 2023, MiniLLM, arXiv:2306.08543, eq. 2.
    """
    return sum_V(kl_terms(student_NV, teacher_NV))


def reverse_kl_terms(student_NV: Array, teacher_NV: Array) -> Array:
    """Return p_s·(log p_s − log p_t)."""
    return forward_kl_terms(teacher_NV, student_NV)


def symmetric_kl(student_NV: Array, teacher_NV: Array, sum_V: SumV) -> Array:
    """Return ½·KL(p_t ‖ p_s) + ½·KL(p_s ‖ p_t) = ½·Σ (p_t − p_s)·(log p_t − log p_s). Range [0, ∞).

    Gradient with respect to the student's tempered logits: the mean of those of the two KLs.
    Paper: Jeffreys 1946, An invariant form for the prior probability in estimation problems, Proc. R. Soc. A 186.
    """
    return sum_V(symmetric_kl_terms(student_NV, teacher_NV))


def symmetric_kl_terms(student_NV: Array, teacher_NV: Array) -> Array:
    """Return ½·(p_t − p_s)·(log p_t − log p_s)."""
    return 0.5 * jeffreys_terms(teacher_NV, student_NV)


def jsd(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, beta: float = 0.5) -> Array:
    """Return β·KL(p_t ‖ m) + (1 − β)·KL(p_s ‖ m), m = β·p_t + (1 − β)·p_s: Jensen and Shannon's, skewed by β.

    It vanishes at both ends: jsd/β → forward KL as β → 0, jsd/(1 − β) → reverse KL as β → 1. Gradient with respect to
    the student's tempered logits: (1 − β)·p_s·(g − Σ p_s·g), g = log(p_s/m). Range [0, entropy of (β, 1 − β)], so at
    most log 2; 0 < β < 1.
    Paper: Agarwal et al. 2023, On-Policy Distillation of Language Models, arXiv:2306.13649.
    """
    return sum_V(jsd_terms(student_NV, teacher_NV, beta=beta)[1])


def jsd_terms(student_NV: Array, teacher_NV: Array, *, beta: float) -> tuple[Array, Array]:
    """Return β·p_t·log(p_t/m) + (1 − β)·p_s·log(p_s/m), twice: it is non-negative."""
    return mixture_terms(teacher_NV, student_NV, beta, beta, 1 - beta)


def interpolated_jsd(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, beta: float = 0.5) -> Array:
    """Return (1 − β)·KL(p_t ‖ m) + β·KL(p_s ‖ m), m = β·p_t + (1 − β)·p_s: the jsd with its weights changed over.

    So it tends to the forward KL as β → 0 and to the reverse KL as β → 1: a knob for the direction. Gradient with
    respect to the student's tempered logits: p_s·(g − Σ p_s·g), g = β·log(p_s/m) − (1 − β)·((1 − β)·p_t + β·p_s)/m.
    Range [0, −(1 − β)·log β − β·log(1 − β)]; 0 < β < 1.
    Paper: two skewed KLs of Ko et al. 2024, arXiv:2402.03898, towards the mixture of Agarwal et al. 2023.
    """
    return sum_V(interpolated_jsd_terms(student_NV, teacher_NV, beta=beta)[1])


def interpolated_jsd_terms(student_NV: Array, teacher_NV: Array, *, beta: float) -> tuple[Array, Array]:
    """Return (1 − β)·p_t·log(p_t/m) + β·p_s·log(p_s/m), and the same non-negative."""
    return mixture_terms(teacher_NV, student_NV, beta, 1 - beta, beta)


def skewed_forward_kl(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, skew: float = 0.1) -> Array:
    """Return KL(p_t ‖ m), m = λ·p_t + (1 − λ)·p_s with λ = skew: a forward KL that no single token can blow up.

    Gradient with respect to the student's tempered logits: p_s·(g − Σ p_s·g), g = −(1 − λ)·p_t/m. Range [0, −log λ];
    0 < λ < 1, and λ → 0 is the forward KL.
    Paper: Ko et al. 2024, DistiLLM, arXiv:2402.03898.
    """
    return sum_V(skewed_forward_kl_terms(student_NV, teacher_NV, skew=skew)[1])


def skewed_forward_kl_terms(student_NV: Array, teacher_NV: Array, *, skew: float) -> tuple[Array, Array]:
    """Return p_t·log(p_t/m), and the same non-negative."""
    return mixture_terms(teacher_NV, student_NV, skew, 1.0, 0.0)


def skewed_reverse_kl(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, skew: float = 0.1) -> Array:
    """Return KL(p_s ‖ m), m = (1 − λ)·p_t + λ·p_s with λ = skew: a reverse KL that bears a teacher's zeros.

    Gradient with respect to the student's tempered logits: p_s·(g − Σ p_s·g), g = log(p_s/m) − λ·p_s/m.
    Range [0, −log λ]; 0 < λ < 1, and λ → 0 is the reverse KL.
    Paper: Ko et al. 2024, DistiLLM, arXiv:2402.03898.
    """
    return sum_V(skewed_reverse_kl_terms(student_NV, teacher_NV, skew=skew)[1])


def skewed_reverse_kl_terms(student_NV: Array, teacher_NV: Array, *, skew: float) -> tuple[Array, Array]:
    """Return p_s·log(p_s/m), and the same non-negative."""
    return mixture_terms(student_NV, teacher_NV, skew, 1.0, 0.0)


def total_variation(student_NV: Array, teacher_NV: Array, sum_V: SumV) -> Array:
    """Return ½·Σ |p_t − p_s|: how much probability lies in the wrong place. Range [0, 1].

    Gradient with respect to the student's tempered logits: ½·p_s·(g − Σ p_s·g), g = sign(p_s − p_t).
    Paper: Wen et al. 2023, f-Divergence Minimization for Sequence-Level Knowledge Distillation, arXiv:2307.15190.
    """
    return sum_V(total_variation_terms(student_NV, teacher_NV))


def total_variation_terms(student_NV: Array, teacher_NV: Array) -> Array:
    """Return ½·|p_t − p_s|."""
    return 0.5 * jnp.abs(jnp.exp(teacher_NV) - jnp.exp(student_NV))


def alpha_beta(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, alpha: float = 0.2, beta: float = 0.7) -> Array:
    """Return Σ p_t^(α+β)/(β·(α+β)) + p_s^(α+β)/(α·(α+β)) − p_t^α·p_s^β/(α·β), which has both KLs as its corners.

    Its limits are analytic: (1, 0) is the forward KL, (0, 1) the reverse KL, (0, 0) is ½·Σ (log p_t − log p_s)².
    Gradient with respect to the student's tempered logits: g − p_s·Σ g, g = p_s^β·(p_s^α − p_t^α)/α. So β weighs by
    the student's own confidence, and α measures from the log ratio (0) to the difference (1). Range [0, ∞); α, β >= 0.
    Paper: Wang et al. 2025, ABKD, arXiv:2505.04560; the divergence is of Cichocki et al. 2011, Entropy 13(1).
    """
    return sum_V(alpha_beta_pointwise(student_NV, teacher_NV, alpha=alpha, beta=beta))


def alpha_beta_pointwise(student_NV: Array, teacher_NV: Array, *, alpha: float, beta: float) -> Array:
    """Return the terms of `alpha_beta`, which are non-negative."""
    return alpha_beta_terms(teacher_NV, student_NV, alpha, beta)


def soft_cross_entropy(student_NV: Array, teacher_NV: Array, sum_V: SumV) -> Array:
    """Return −Σ p_t·log p_s: the forward KL plus the teacher's entropy, which is what remains at equality.

    Gradient with respect to the student's tempered logits: p_s − p_t. Range [entropy of the teacher, ∞).
    Paper: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """
    return sum_V(soft_cross_entropy_terms(student_NV, teacher_NV))


def soft_cross_entropy_terms(student_NV: Array, teacher_NV: Array) -> Array:
    """Return −p_t·log p_s."""
    return -jnp.exp(teacher_NV) * student_NV


def mse(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, vocab_size: int) -> Array:
    """Return Σ (z_s − z_t)²/V of the logits z: a constant added to one model's logits counts, to both's does not.

    Gradient with respect to z_s: 2·(z_s − z_t)/V. Range [0, ∞).
    Paper: Kim et al. 2021, Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation,
    arXiv:2105.08919.
    """
    return sum_V(mse_terms(student_NV, teacher_NV, vocab_size=vocab_size))


def mse_terms(student_NV: Array, teacher_NV: Array, *, vocab_size: int) -> Array:
    """Return (z_s − z_t)²/V."""
    return jnp.square(student_NV - teacher_NV) / vocab_size
