"""The reverse KL by the student's own samples: what a token says of it, and what the rest of its answer does.

At a token y that the student drew, KL(q ‖ p) is known by log q(y) − log p(y) alone. The KL of whole answers has one
more part: a token also decides what comes after it, so its likelihood is pushed against the KL of the rest.
Where another drew the tokens (the student of some steps ago, or its mixture with the teacher), each weighs how much
likelier the student now makes it: the importance ratio of that token alone, as in the paper, not of all before it.
Paper: Gu et al. 2023, MiniLLM, arXiv:2306.08543, section 2.2 and appendix A.1.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kdjax.losses.terms import SumV
from kdjax.shapes import Array, Drawn

TO_GO = ("return_to_go", "mean_to_go")
"""Token weights that come from the rest of an answer: Σ of log q − log p over the tokens after this one, and its mean
over them (MiniLLM's length normalisation)."""

IMPORTANCE = "importance"
"""The token weight of a divergence over the whole vocabulary, where others than the student drew the answer."""


def _of_target(x_NV: Array, sum_V: SumV, is_target_NV: Array) -> Array:
    return sum_V(jnp.where(is_target_NV, x_NV, 0.0))


def sampled_reverse_kl(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, is_target_NV: Array) -> Array:
    """Return log q(y) − log p(y) of the target y, whose gradient is that times ∇ log q(y).

    In the mean over targets that the student drew, both are those of KL(q ‖ p) (Williams 1992, REINFORCE). Can be
    negative. MiniLLM, arXiv:2306.08543, equation 2.
    """
    log_q_N, log_p_N = (_of_target(x_NV, sum_V, is_target_NV) for x_NV in (student_NV, teacher_NV))
    return lax.stop_gradient(log_q_N - log_p_N) * (1 + log_q_N - lax.stop_gradient(log_q_N))


def likelihood_ratio(student_NV: Array, teacher_NV: Array, sum_V: SumV, *, is_target_NV: Array) -> Array:
    """Return q(y) over what it was when y was drawn, which is now: 1, with the gradient ∇ log q(y).

    Weighed by `return_to_go` it is the part of the KL of whole answers that each token's own KL leaves out.
    """
    log_q_N = _of_target(student_NV, sum_V, is_target_NV)
    return jnp.exp(log_q_N - lax.stop_gradient(log_q_N))


def to_go(x_BR: Array, weight_BR: Array, segment_BR: Array) -> dict[str, Array]:
    """Return what follows each token within its answer, by the names of `TO_GO`.

    Args:
        x_BR: of each token, log q − log p.
        weight_BR: 0 where a token does not count; those stand behind all others of a row.
        segment_BR: of which answer a token is; a row's stand one after the other.
    """
    counts_BR = weight_BR != 0
    x_BR, segment_BR = jnp.where(counts_BR, x_BR, 0.0), jnp.where(counts_BR, segment_BR, 0)
    is_last_BR = jnp.pad(segment_BR[:, 1:] != segment_BR[:, :-1], ((0, 0), (0, 1)), constant_values=True)

    def join(later, own):  # the scan runs from the end of a row to its beginning
        (last_l, sum_l, count_l), (last, total, count) = later, own
        return last_l | last, jnp.where(last, total, total + sum_l), jnp.where(last, count, count + count_l)

    given = is_last_BR, x_BR, counts_BR.astype(jnp.float32)
    _, sum_BR, count_BR = lax.associative_scan(join, given, reverse=True, axis=1)
    after_BR, left_BR = sum_BR - x_BR, count_BR - counts_BR
    return dict(zip(TO_GO, (after_BR, after_BR / jnp.maximum(left_BR, 1.0)), strict=True))


def importance(now_BR: Array, drawn: Drawn, clip: float, cost_BR: Array | None = None) -> Array:
    """Return how much likelier the student makes each token than what drew it, kept near 1 where the student moved.

    The ratio to the student of then is clipped to 1 ± clip. Where tokens are weighed by a cost, that is PPO's way:
    a token whose ratio is beyond that, in the direction in which its cost pulls, is left out (Schulman et al. 2017,
    arXiv:1707.06347, equation 7). The ratio of the student of then to what drew the token is not clipped.

    Args:
        now_BR: log-probabilities of the student as it is.
        drawn: those of then.
        clip: above 0.
        cost_BR: what the tokens' likelihood is multiplied by; None where it is no such estimate.
    """
    moved_BR, other_BR = jnp.exp(now_BR - drawn.student_BR), jnp.exp(drawn.student_BR - drawn.source_BR)
    if cost_BR is None:
        return jnp.clip(moved_BR, 1 - clip, 1 + clip) * other_BR
    goes_on_BR = jnp.where(cost_BR < 0, moved_BR <= 1 + clip, moved_BR >= 1 - clip)
    return jnp.where(goes_on_BR, moved_BR * other_BR, 0.0)


def sample_weights(
    now_BR: Array, teacher_BR: Array, weight_BR: Array, segment_BR: Array, drawn: Drawn | None, clip: float
) -> dict[str, Array]:
    """Return the token weights that samples bring, by the names of `TO_GO`, `IMPORTANCE` and the estimators.

    Args:
        now_BR: log q of each target, of the student as it is.
        teacher_BR: log p of it.
        weight_BR: as of `to_go`.
        segment_BR: likewise.
        drawn: who drew the targets; None is the student as it is.
        clip: of `importance`.
    """
    gap_BR = now_BR - teacher_BR
    weights = to_go(gap_BR, weight_BR, segment_BR)
    if drawn is None:
        return weights | {IMPORTANCE: jnp.ones_like(gap_BR)}
    weights = {name: cost_BR * importance(now_BR, drawn, clip, cost_BR) for name, cost_BR in weights.items()}
    return weights | {
        IMPORTANCE: importance(now_BR, drawn, clip),
        "sampled_reverse_kl": importance(now_BR, drawn, clip, gap_BR),
    }
