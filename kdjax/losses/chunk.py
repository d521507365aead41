"""What the logits of some tokens are worth: the weighted loss, and the parts that a run logs.

A teacher that gives all logits, one that gives its most likely entries, and one that gives random draws are compared
with the student by one small function each, a row of `COMPARED`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError, did_you_mean
from kdjax.losses.across import projected, sorted_distance
from kdjax.losses.logits import NOWHERE, Vocabulary, log_softmax, log_sum_exp, standardise
from kdjax.losses.objective import ObjectiveConfig, Term
from kdjax.losses.schedules import ends, value_at
from kdjax.shapes import Array, Sampled, TopK

SMALLEST_LOG = -87.0
"""The log of the smallest mass that float32 holds: a teacher's tail that was rounded to 0 is taken for this."""


class Hidden(NamedTuple):
    """Hidden states of each teacher, and how much each counts; None for a single one."""

    states: tuple[Array, ...]
    weights_NK: Array | None


class Tokens(NamedTuple):
    """What belongs to a token: every leaf has a leading N."""

    student_ND: Array
    teacher: Hidden | TopK | Sampled | None
    targets_N: Array
    ce_weight_N: Array
    kd_weight_N: Array
    weights: dict[str, Array]
    """Further weights by name, of terms that ask for them."""


class Dense(NamedTuple):
    """The same teachers, with all their logits."""

    logits: tuple[Array, ...]
    weights_NK: Array | None


class Other(NamedTuple):
    """A teacher with another vocabulary, with all its logits."""

    logits_NU: Array
    over: Vocabulary
    student_of_U: Array


def tempered(logits_NV: Array, term: Term, temperature: Array | float, over: Vocabulary) -> Array:
    """Return logits as a term compares them: standardised if it asks for that, and divided by the temperature."""
    logits_NV = standardise(logits_NV, over) if term.standardise else logits_NV
    return logits_NV if isinstance(temperature, float) and temperature == 1 else logits_NV / temperature


def _dense(term: Term, temperature, student_NV: Array, teacher: Dense, over: Vocabulary, is_target_NV: Array) -> Array:
    sides = [tempered(logits_NV, term, temperature, over) for logits_NV in (student_NV, *teacher.logits)]
    if term.chosen.row.of == "logits":
        student_NV, *teachers = [over.without_padding(side_NV) for side_NV in sides]
        teacher_NV = _weighted(teachers, teacher.weights_NK)
    else:
        student_NV, *teachers = [log_softmax(side_NV, over) for side_NV in sides]
        teacher_NV = mixed(teachers, teacher.weights_NK)
    given = {"is_target_NV": is_target_NV, "max_V": over.max_V, "vocab_size": over.size}
    return _diverge(term, student_NV, teacher_NV, over, {name: given[name] for name in term.chosen.row.needs})


def _diverge(term: Term, student_NV: Array, teacher_NV: Array, over: Vocabulary, given: dict[str, Any]) -> Array:
    """Return the term's divergence between what its row compares, each entry capped if it asks for that."""
    row, arguments = term.chosen.row, given | dict(term.chosen.parameters)
    if term.clip_entry and row.pointwise is not None:
        terms_NV = row.pointwise(student_NV, teacher_NV, **arguments)
        return over.sum_V(jnp.minimum(over.without_padding(terms_NV), term.clip_entry))
    return row.function(student_NV, teacher_NV, over.sum_V, **arguments)


def _weighted(logits: list[Array], weights_NK: Array | None) -> Array:
    if weights_NK is None:
        return logits[0]
    return sum((weights_NK[:, k, None] * logits_NV for k, logits_NV in enumerate(logits)), jnp.float32(0))


def mixed(logs: list[Array], weights_NK: Array | None) -> Array:
    """Return log Σ_k w_k·p_k."""
    if weights_NK is None:
        return logs[0]
    log_weights_NK = jnp.log(jnp.maximum(weights_NK, 1e-37))
    mixed_NV = logs[0] + log_weights_NK[:, :1]
    for k in range(1, len(logs)):
        mixed_NV = jnp.logaddexp(mixed_NV, logs[k] + log_weights_NK[:, k, None])
    return mixed_NV


def _top_k(term: Term, temperature, student_NV: Array, teacher: TopK, over: Vocabulary, is_target_NV: Array) -> Array:
    """Return the divergence between distributions over the teacher's picks and one bucket of all else.

    Merging entries never raises an f-divergence: this is a lower bound of the whole one. Nothing is renormalised.
    """
    log_NV = log_softmax(tempered(student_NV, term, temperature, over), over)
    others_NV = jnp.where(over.picked(teacher.ids_NP), NOWHERE, log_NV)
    top_N = over.max_V(others_NV)
    tail_N = top_N + jnp.log(over.sum_V(jnp.exp(others_NV - top_N[:, None])))
    student_NB = jnp.concatenate([over.pick(log_NV, teacher.ids_NP), tail_N[:, None]], axis=1)
    log_tail_N = jnp.maximum(teacher.log_tail_N, SMALLEST_LOG)
    teacher_NB = jnp.concatenate([teacher.log_probs_NP, log_tail_N[:, None]], axis=1)
    return _diverge(term, student_NB, teacher_NB, Vocabulary(student_NB.shape[1], student_NB.shape[1]), {})


def _sampled(term: Term, temperature, student_NV: Array, teacher: Sampled, over: Vocabulary, is_target_NV: Array):
    """Return Σ_j weights_j·(log p(id_j) − log q(id_j)): in the mean over draws, KL(p ‖ q)."""
    log_NV = log_softmax(tempered(student_NV, term, temperature, over), over)
    gap_NP = -over.pick(log_NV, teacher.ids_NP)
    if term.chosen.name == "forward_kl":
        gap_NP = gap_NP + teacher.log_probs_NP
    return jnp.sum(teacher.weights_NP * gap_NP, axis=1)


def _other(term: Term, temperature, student_NV: Array, teacher: Other, over: Vocabulary, is_target_NV: Array) -> Array:
    """Return the divergence from the teacher projected onto the student's vocabulary; or that of sorted ones."""
    student_NV = log_softmax(tempered(student_NV, term, temperature, over), over)
    teacher_NU = log_softmax(tempered(teacher.logits_NU, term, temperature, teacher.over), teacher.over)
    if term.is_across:
        return sorted_distance(student_NV, teacher_NU)
    given = {"is_target_NV": is_target_NV, "max_V": over.max_V, "vocab_size": over.size}
    given = {name: given[name] for name in term.chosen.row.needs}
    return _diverge(term, student_NV, projected(teacher_NU, teacher.student_of_U, over.columns), over, given)


COMPARED: dict[type, Callable[..., Array]] = {Dense: _dense, TopK: _top_k, Sampled: _sampled, Other: _other}
"""Kind of teacher -> loss_N of a term."""

TOKEN_WEIGHTS: dict[str, Callable[[dict[str, Array], Vocabulary], Array]] = {
    "teacher_entropy": lambda stats, over: stats["teacher_entropy"] / jnp.log(over.size),
    "teacher_confidence": lambda stats, over: stats["teacher_confidence"],
    "student_entropy": lambda stats, over: stats["student_entropy"] / jnp.log(over.size),
    "student_confidence": lambda stats, over: stats["student_confidence"],
    "difficulty": lambda stats, over: 1 - jnp.exp(-stats["ce"]),
}
"""Weights that come from the logits themselves, each from 0 to 1 and without gradient: entropies as a share of log V,
the probability of the likeliest entry, and 1 − p_student(target). Weights are not renormalised to a sum of 1."""


def check_terms(objective: ObjectiveConfig, kind: type, temperature: float, weights: dict[str, Array]) -> None:
    """Check that every term can be had of a kind of teacher.

    Args:
        objective: what is minimised.
        kind: a key of `COMPARED`.
        temperature: of a sparse signal.
        weights: the arrays by name that the batch brings.

    Raises:
        UserError: naming the divergence and the reason.
    """
    for term in objective.all_terms:
        name, row, _ = term.chosen
        known = {*TOKEN_WEIGHTS, *weights}
        if term.token_weight and term.token_weight not in known:
            raise UserError(f"no token weight {term.token_weight!r}{did_you_mean(term.token_weight, known)}")
        if term.is_across and kind is not Other:
            raise UserError(
                f"{name} is of a teacher with another tokenizer; set data.teacher_tokenizer, or choose another"
            )
        if kind is Dense:
            continue
        if kind is Other:
            if term.of_own_samples or row.of == "logits" or name == "alm":
                raise UserError(
                    f"{name} cannot be had token by token of a teacher with another tokenizer; use alm alone, uld, or "
                    "a divergence of probabilities: forward_kl, reverse_kl, jsd"
                )
            continue
        if term.token_weight.startswith("teacher_"):
            raise UserError(f"token weight {term.token_weight} needs all of the teacher's logits; got a sparse signal")
        if ends(term.temperature, "temperature") != (temperature, temperature):
            raise UserError(
                f"the objective's temperature is {term.temperature} but the teacher's sparse signal was taken at "
                f"{temperature}, which cannot be re-tempered; use {temperature}, or take it anew"
            )
        if kind is TopK and (not row.buckets or term.standardise):
            raise UserError(
                f"{name}{' on standardised logits' if term.standardise else ''} needs all of the teacher's logits; "
                "from a top-k and its tail an f-divergence can be had: forward_kl, reverse_kl, jsd, total_variation"
            )
        if kind is Sampled and (
            name not in ("forward_kl", "soft_cross_entropy") or term.standardise or term.clip_entry
        ):
            raise UserError(
                f"{name} of sampled logits would be biased: draws estimate what is linear in the teacher's "
                "probabilities alone; use forward_kl or soft_cross_entropy, unclipped, on logits as they are"
            )


def chunk_loss(
    objective: ObjectiveConfig, over: Vocabulary, tokens: Tokens, progress: Array, student_NV: Array, teacher: Any
) -> tuple[Array, dict[str, Array]]:
    """Return the weighted loss of some tokens' logits, and its parts, which carry no gradient.

    Args:
        objective: what is minimised.
        over: the vocabulary of the logits.
        tokens: targets and weights (hidden states are not read).
        progress: share of the run that is done, for schedules.
        student_NV: float32 logits.
        teacher: one of the kinds in `COMPARED`, or None.
    """
    is_target_NV = over.is_one(tokens.targets_N)
    log_NV = log_softmax(student_NV, over)
    loss, parts, ce_N = _cross_entropy(objective, over, tokens, student_NV, log_NV, is_target_NV)
    if teacher is None:
        return loss, parts
    stats = lax.stop_gradient({"ce": ce_N} | _stats(over, student_NV, log_NV, teacher, is_target_NV))
    weights = tokens.weights | {name: of(stats, over) for name, of in _asked(objective).items()}
    kd, by_term = jnp.float32(0), {}
    for number, term in enumerate(objective.all_terms):
        temperature, (name, row, _) = value_at(term.temperature, progress), term.chosen
        loss_N = COMPARED[type(teacher)](term, temperature, student_NV, teacher, over, is_target_NV)
        loss_N = jnp.minimum(loss_N, term.clip_token) if term.clip_token else loss_N
        weight_N = tokens.kd_weight_N * value_at(term.weight, progress)
        for key in (term.token_weight, name):  # a weight that has a divergence's own name is always its
            weight_N = weight_N * weights[key] if key in weights else weight_N
        value = (row.factor(temperature) if term.scaled else 1.0) * jnp.sum(weight_N * loss_N)
        kd, by_term[f"kd_{number}_{name}"] = kd + value, value
    parts |= {"kd": kd} | (by_term if len(by_term) > 1 else {})
    parts |= {name: jnp.sum(tokens.kd_weight_N * stats[name]) for name in LOGGED if name in stats}
    if "teacher_ce" in stats:
        parts["teacher_ce"] = jnp.sum(tokens.ce_weight_N * stats["teacher_ce"])
    alpha = value_at(objective.alpha, progress)
    # A constant 0 leaves out the cross entropy: 0·gradient would be computed.
    loss = kd if isinstance(alpha, float) and alpha == 0 else alpha * loss + (1 - alpha) * kd
    return loss, parts


def _cross_entropy(objective: ObjectiveConfig, over: Vocabulary, tokens: Tokens, student_NV, log_NV, is_target_NV):
    """Return what α weighs, the parts, and the cross entropy of each token to its target."""
    ce_N = -over.sum_V(jnp.where(is_target_NV, log_NV, 0.0))
    loss = ce = jnp.sum(tokens.ce_weight_N * ce_N)
    parts = {"ce": ce}
    if objective.label_smoothing:
        even_N = -over.sum_V(over.without_padding(log_NV)) / over.size
        parts["ce_even"] = jnp.sum(tokens.ce_weight_N * even_N)
        loss = (1 - objective.label_smoothing) * ce + objective.label_smoothing * parts["ce_even"]
    if objective.z_loss:
        parts["z_loss"] = jnp.sum(tokens.ce_weight_N * log_sum_exp(student_NV, over) ** 2)
        loss = loss + objective.z_loss * parts["z_loss"]
    return loss, parts, ce_N


LOGGED = ("agreement", "student_confidence", "teacher_confidence", "student_entropy", "teacher_entropy")
"""What is logged of each compared token: whether both models' likeliest entry is the same, its probability in each
model, and the entropy (nats) of each; all at temperature 1."""


def _stats(over: Vocabulary, student_NV: Array, log_NV: Array, teacher: Any, is_target_NV: Array) -> dict[str, Array]:
    """Return figures of each token that come from its logits, x_N."""
    stats = {
        "student_confidence": jnp.exp(over.max_V(log_NV)),
        "student_entropy": -over.sum_V(jnp.exp(log_NV) * log_NV),
    }
    if isinstance(teacher, TopK):
        best_N1 = jnp.argmax(teacher.log_probs_NP, axis=1)[:, None]
        best_N = over.pick(student_NV, jnp.take_along_axis(teacher.ids_NP, best_N1, axis=1))[:, 0]
        stats["agreement"] = jnp.where(best_N >= over.max_V(student_NV), 1.0, 0.0)
    if isinstance(teacher, Dense | Other):
        teacher_NV = _log_probs(teacher, over)
        both_NV = _is_top(student_NV, over) & _is_top(teacher_NV, over)
        stats |= {
            "teacher_confidence": jnp.exp(over.max_V(teacher_NV)),
            "teacher_entropy": -over.sum_V(jnp.exp(teacher_NV) * teacher_NV),
            "agreement": over.max_V(jnp.where(both_NV, 1.0, 0.0)),  # maxima only: argmax is slow on CPUs
        }
    if isinstance(teacher, Dense):
        stats["teacher_ce"] = -over.sum_V(jnp.where(is_target_NV, teacher_NV, 0.0))
    return stats


def _log_probs(teacher: Dense | Other, over: Vocabulary) -> Array:
    """Return the teacher's log-probabilities over the student's vocabulary, at temperature 1."""
    if isinstance(teacher, Other):
        teacher_NU = log_softmax(teacher.logits_NU, teacher.over)
        return projected(teacher_NU, teacher.student_of_U, over.columns)
    return mixed([log_softmax(logits_NV, over) for logits_NV in teacher.logits], teacher.weights_NK)


def _is_top(x_NV: Array, over: Vocabulary) -> Array:
    return x_NV == over.max_V(x_NV)[:, None]


def _asked(objective: ObjectiveConfig) -> dict[str, Callable[..., Array]]:
    names = {term.token_weight for term in objective.all_terms}
    return {name: of for name, of in TOKEN_WEIGHTS.items() if name in names}
