"""The table of divergences between teacher and student, and how one is chosen by its name.

Each is ``f(student_NV, teacher_NV, sum_V) -> loss_N`` over log-probabilities or logits at temperature T. It never
reduces over V itself: `sum_V` is given, and is a plain sum or one joined over devices that hold parts of the
vocabulary. To add one: write the function and give it a row in `DIVERGENCES`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from kdjax.errors import UserError, did_you_mean
from kdjax.losses import across, compound, policy, sums
from kdjax.losses.terms import SumV, kl_terms
from kdjax.shapes import Array

__all__ = ["ACROSS", "DIVERGENCES", "ESTIMATORS", "Chosen", "Divergence", "Range", "SumV", "choose", "kl_terms"]


class Range(NamedTuple):
    """What a parameter may be."""

    low: float
    high: float = math.inf
    is_open: bool = False
    """The ends are left out."""
    at_ends: str = ""
    """What to use in place of an end that is left out."""

    def has(self, value: float) -> bool:
        """Return whether `value` lies in the range; infinity and NaN never do."""
        inside = self.low < value < self.high if self.is_open else self.low <= value <= self.high
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        """Return ``above 0 and below 1``, or ``from 0``."""
        if self.is_open:
            return f"above {self.low:g} and below {self.high:g}"
        return f"from {self.low:g}" + (f" to {self.high:g}" if math.isfinite(self.high) else "")


class Divergence(NamedTuple):
    """A row of `DIVERGENCES`."""

    function: Callable[..., Array]
    """f(student_NV, teacher_NV, sum_V, **what it needs, **its parameters) -> loss_N."""
    factor: Callable[[float], float]
    """What the loss is multiplied by at temperature T, so that its gradient keeps its size as T grows."""
    of: str = "log_probs"
    """What the two arrays are, at temperature T: "log_probs" or "logits"."""
    needs: tuple[str, ...] = ()
    """What is passed by keyword: "is_target_NV" (True at the data's next token), "max_V" (like sum_V; no gradient),
    "vocab_size" (real columns)."""
    parameters: dict[str, Range] = {}
    """Numbers passed by keyword; their defaults stand in the function's signature."""
    pointwise: Callable[..., Array] | None = None
    """The textbook's terms [N, V], for clipping each: f without sum_V. None where the loss is more than one sum."""
    buckets: bool = False
    """Never rises where tokens are put together into one; so the top-k and one bucket for the tail bound it below."""


class Chosen(NamedTuple):
    """A row by its name, with the values of all its parameters."""

    name: str
    row: Divergence
    parameters: tuple[tuple[str, float], ...]


def squared(temperature: float) -> float:
    """Return T²: the factor of KL-like divergences (Hinton et al. 2015, arXiv:1503.02531, section 2.1)."""
    return temperature * temperature


def linear(temperature: float) -> float:
    """Return T: the factor of what grows with the difference of probabilities, not with its square."""
    return temperature


def none(temperature: float) -> float:
    """Return 1: no factor."""
    return 1.0


def textbook(terms: Callable[..., tuple[Array, Array]]) -> Callable[..., Array]:
    """Return the first of two forms of terms."""
    return lambda *arrays, **parameters: terms(*arrays, **parameters)[0]


def choose(text: str) -> Chosen:
    """Return the row that ``NAME`` or ``NAME(parameter=number, …)`` names; parameters not named have their defaults.

    Raises:
        UserError: unknown names, what is no number, and numbers out of range, with what to use in their place.
    """
    parsed = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if not parsed:
        raise UserError(f"divergence {text!r} is not understood; wanted NAME or NAME(parameter=number, …)")
    name, inner = parsed.groups()
    known = DIVERGENCES | ESTIMATORS | ACROSS
    if name not in known:
        raise UserError(f"divergence {name!r} is unknown{did_you_mean(name, known)}")
    row = known[name]
    pairs = [_parameter(text, name, row, part) for part in (inner or "").split(",") if part.strip()]
    if len({key for key, _ in pairs}) < len(pairs):
        raise UserError(f"{text}: a parameter is given twice; wanted each once")
    signature = inspect.signature(row.function).parameters
    values = {key: signature[key].default for key in row.parameters} | dict(pairs)
    return Chosen(name, row, tuple(values.items()))


def _parameter(text: str, name: str, row: Divergence, part: str) -> tuple[str, float]:
    """Return what ``parameter=number`` says, checked against the row."""
    key, _, number = (word.strip() for word in part.partition("="))
    if key not in row.parameters:
        known = did_you_mean(key, row.parameters) if row.parameters else f"; it takes none: write {name}"
        raise UserError(f"{text}: {name} has no parameter {key!r}{known}")
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"{text}: {key} is {number!r}; wanted a number, as in {name}({key}=0.5)") from None
    allowed = row.parameters[key]
    if not allowed.has(value):
        instead = f"; {allowed.at_ends}" if allowed.at_ends else ""
        raise UserError(f"{text}: {key} is {number}; wanted a finite number {allowed}{instead}")
    return key, value


def _between(at_ends: str) -> Range:
    """Return the range of what lies strictly between 0 and 1."""
    return Range(0.0, 1.0, True, at_ends)


def _mixture(function: Callable[..., Array], terms: Callable[..., tuple[Array, Array]], **share: str) -> Divergence:
    """Return the row of what compares with a mixture; `share` is its parameter, and what stands for its ends."""
    parameters = {name: _between(at_ends) for name, at_ends in share.items()}
    return Divergence(function, squared, parameters=parameters, pointwise=textbook(terms), buckets=True)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(sums.forward_kl, squared, pointwise=sums.forward_kl_terms, buckets=True),
    "reverse_kl": Divergence(sums.reverse_kl, squared, pointwise=sums.reverse_kl_terms, buckets=True),
    "symmetric_kl": Divergence(sums.symmetric_kl, squared, pointwise=sums.symmetric_kl_terms, buckets=True),
    "jsd": _mixture(
        sums.jsd, sums.jsd_terms, beta="jsd is 0 at both ends: use forward_kl in place of 0, reverse_kl in place of 1"
    ),
    "interpolated_jsd": _mixture(
        sums.interpolated_jsd,
        sums.interpolated_jsd_terms,
        beta="use forward_kl in place of 0, reverse_kl in place of 1",
    ),
    "skewed_forward_kl": _mixture(
        sums.skewed_forward_kl, sums.skewed_forward_kl_terms, skew="use forward_kl in place of 0; at 1 it is always 0"
    ),
    "skewed_reverse_kl": _mixture(
        sums.skewed_reverse_kl, sums.skewed_reverse_kl_terms, skew="use reverse_kl in place of 0; at 1 it is always 0"
    ),
    "total_variation": Divergence(sums.total_variation, linear, pointwise=sums.total_variation_terms, buckets=True),
    "alpha_beta": Divergence(
        sums.alpha_beta,
        squared,
        parameters={"alpha": Range(0.0), "beta": Range(0.0)},
        pointwise=sums.alpha_beta_pointwise,
    ),
    "adaptive_kl": Divergence(
        compound.adaptive_kl,
        squared,
        needs=("max_V", "vocab_size"),
        parameters={"head": _between("in place of 1, where all is head, use forward_kl")},
    ),
    "decoupled_kd": Divergence(
        compound.decoupled_kd,
        squared,
        needs=("is_target_NV", "max_V"),
        parameters={"alpha": Range(0.0), "beta": Range(0.0)},
    ),
    "soft_cross_entropy": Divergence(
        sums.soft_cross_entropy, squared, pointwise=sums.soft_cross_entropy_terms, buckets=True
    ),
    "hard_cross_entropy": Divergence(compound.hard_cross_entropy, none, needs=("max_V",)),
    "mse": Divergence(sums.mse, none, of="logits", needs=("vocab_size",), pointwise=sums.mse_terms),
    "cosine": Divergence(compound.cosine, none, of="logits"),
}

ESTIMATORS: dict[str, Divergence] = {
    "sampled_reverse_kl": Divergence(policy.sampled_reverse_kl, squared, needs=("is_target_NV",)),
    "likelihood_ratio": Divergence(policy.likelihood_ratio, squared, needs=("is_target_NV",)),
}
"""What stands in a divergence's place, but is right only in the mean over tokens that the student drew itself."""

ACROSS: dict[str, Divergence] = {
    "uld": Divergence(across.sorted_distance, linear),
    "alm": Divergence(across.chunk_divergence, none, parameters={"tau": Range(0.0, is_open=True)}),
}
"""What stands in a divergence's place where the teacher has another tokenizer. `uld` takes log-probabilities over two
vocabularies, and `alm` those of chunks of text. A divergence of probabilities serves as well, with the teacher's
projected onto the student's vocabulary."""
