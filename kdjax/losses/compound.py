"""Divergences that are more than one sum of terms: they weigh parts of the vocabulary, or compare directions."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kdjax.losses.logits import NOWHERE
from kdjax.losses.terms import SumV, kl_terms
from kdjax.shapes import Array

HALVINGS = 26


def adaptive_kl(
    student_NV: Array, teacher_NV: Array, sum_V: SumV, *, max_V: SumV, vocab_size: int, head: float = 0.5
) -> Array:
    """Return w·KL(p_t ‖ p_s) + (1 − w)·KL(p_s ‖ p_t), w the share that the teacher's head has in Σ |p_t − p_s|.

    The head is the teacher's most likely tokens as far as their mass is at most `head`, the most likely one (with its
    equals) always; the rest is the tail. w carries no gradient, so the gradient is that of the two KLs, weighted.
    Range [0, ∞), 0 < head < 1; were all in the head, it would be the forward KL.
    Paper: Wu et al. 2024, Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models,
    arXiv:2404.02657, section 4.
    """
    teacher_p_NV = lax.stop_gradient(jnp.exp(teacher_NV))
    gap_NV = jnp.abs(teacher_p_NV - lax.stop_gradient(jnp.exp(student_NV)))
    in_head_NV = teacher_p_NV >= _head_from(teacher_p_NV, sum_V, max_V, vocab_size, head)[:, None]
    gap_head_N, gap_N = sum_V(jnp.where(in_head_NV, gap_NV, 0.0)), sum_V(gap_NV)
    share_N = gap_head_N / jnp.where(gap_N > 0, gap_N, 1.0)
    forward_N, reverse_N = sum_V(kl_terms(teacher_NV, student_NV)), sum_V(kl_terms(student_NV, teacher_NV))
    return share_N * forward_N + (1 - share_N) * reverse_N


def _head_from(p_NV: Array, sum_V: SumV, max_V: SumV, vocab_size: int, head: float) -> Array:
    """Return the probability from which on tokens belong to the head, by bisection: no sort, so V may be spread.

    Tokens below (1 − head)/V have less than 1 − head together, so all others have more than `head`: a lower bound.
    """

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_N, high_N = bounds
        middle_N = jnp.sqrt(low_N * high_N)
        too_much_N = sum_V(jnp.where(p_NV >= middle_N[:, None], p_NV, 0.0)) > head
        return jnp.where(too_much_N, middle_N, low_N), jnp.where(too_much_N, high_N, middle_N)

    top_N = max_V(p_NV)
    return lax.fori_loop(0, HALVINGS, halve, (jnp.minimum(top_N, (1 - head) / vocab_size), top_N))[1]


def decoupled_kd(
    student_NV: Array,
    teacher_NV: Array,
    sum_V: SumV,
    *,
    is_target_NV: Array,
    max_V: SumV,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Array:
    """Return α·KL(b_t ‖ b_s) + β·KL(r_t ‖ r_s): target against all others, and the others among themselves.

    b = (p of the data's token, 1 − it), r = p of the other tokens divided by their sum. With β = 1 − p_t(target) and
    α = 1 it is the forward KL, which so forgets the others where the teacher is sure.
    Gradient with respect to the student's tempered logits: α·(p_s − p_t) at the target and, elsewhere,
    α·(p_t(target) − p_s(target))·r_s + β·(r_s − r_t). Range [0, ∞), α and β >= 0.
    Paper: Zhao et al. 2022, Decoupled Knowledge Distillation, arXiv:2203.08679, eq. 7.
    """

    def split(log_NV: Array) -> tuple[Array, Array, Array]:
        target_N = sum_V(jnp.where(is_target_NV, log_NV, 0.0))
        others_NV = jnp.where(is_target_NV, NOWHERE, log_NV)
        top_N = max_V(others_NV)
        mass_N = sum_V(jnp.where(is_target_NV, 0.0, jnp.exp(others_NV - top_N[:, None])))
        rest_N = top_N + jnp.log(mass_N)  # not log(1 − p): that is −inf where the target has all
        return target_N, rest_N, jnp.where(is_target_NV, NOWHERE, others_NV - rest_N[:, None])

    student_target_N, student_rest_N, student_others_NV = split(student_NV)
    teacher_target_N, teacher_rest_N, teacher_others_NV = split(teacher_NV)
    target_N = kl_terms(teacher_target_N, student_target_N) + kl_terms(teacher_rest_N, student_rest_N)
    return alpha * target_N + beta * sum_V(kl_terms(teacher_others_NV, student_others_NV))


def cosine(student_NV: Array, teacher_NV: Array, sum_V: SumV) -> Array:
    """Return 1 − cos(z_s, z_t) of the logits z, as ½·‖z_s/‖z_s‖ − z_t/‖z_t‖‖², which cancels nothing near equality.

    It does not see the length of a logit vector, so neither the temperature; a constant added to all logits, which no
    probability sees, it does see. A vector of zeros has no direction and counts as it is: ½ from any other, 0 from
    another one. Gradient with respect to z_s: (cos·z_s/‖z_s‖ − z_t/‖z_t‖)/‖z_s‖. Range [0, 2].
    Paper: Ham et al. 2023, Cosine Similarity Knowledge Distillation for Individual Class Information Transfer,
    arXiv:2311.14307, which has it over a batch's predictions.
    """

    def direction(z_NV: Array) -> Array:
        squares_N = sum_V(jnp.square(z_NV))
        return z_NV / jnp.sqrt(jnp.where(squares_N > 0, squares_N, 1.0))[:, None]

    return 0.5 * sum_V(jnp.square(direction(student_NV) - direction(teacher_NV)))


def hard_cross_entropy(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, max_V: SumV) -> Array:
    """Return −log p_s of the teacher's most likely token; equals share: it is what the teacher would write greedily.

    Gradient with respect to the student's tempered logits: p_s − y, y the teacher's choice. Range [0, ∞); not 0 at
    equal distributions.
    Paper: Touvron et al. 2020, Training data-efficient image transformers & distillation through attention,
    arXiv:2012.12877, eq. 3.
    """
    chosen_NV = jnp.where(teacher_NV == max_V(teacher_NV)[:, None], 1.0, 0.0)
    return -sum_V(chosen_NV * student_NV) / sum_V(chosen_NV)
