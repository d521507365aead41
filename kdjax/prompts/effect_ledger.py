"""Where variants of a prompt are evaluated: by scores or the labels' probabilities, each written down and paid once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kdjax.errors import UserError
from kdjax.prompts.bench import BLOCK, KEY, PRIOR
from kdjax.prompts.journal import Journal, Row
from kdjax.prompts.score import LABEL_SCORES, Pair, Scoring, evaluate, log_softmax, priors, weigh_labels
from kdjax.prompts.speaker import Speaker
from kdjax.prompts.tasks import LIKELIHOOD, Candidate, Example
from kdjax.shapes import Array

Ask = Callable[[Sequence[Pair]], Sequence[Row]]


@dataclass(frozen=True)
class Variant:
    """A prompt as it is shown and measured in one way.

    Attributes:
        name: what a reader calls it.
        candidate: instruction and worked examples, in the words of the plain labels.
        scoring: with the task's format and the labels' words of this variant.
        part: what evaluations.jsonl calls format and words.
    """

    name: str
    candidate: Candidate
    scoring: Scoring
    part: str = "plain"


@dataclass
class Ledger:
    """Where variants are evaluated, and each evaluation is written down.

    Attributes:
        speaker: the model.
        scoring: how the task is measured; its labels are those of the data.
        examples: what is measured on.
        journal: what was paid for, in this process or an earlier one.
        report: called after every block.
        paid: evaluations that this process made.
    """

    speaker: Speaker
    scoring: Scoring
    examples: Sequence[Example]
    journal: Journal
    report: Callable[[], None] = lambda: None
    paid: int = 0

    @property
    def writes(self) -> bool:
        """Whether answers are written, not weighed."""
        return not self.scoring.by_labels and self.scoring.measure != LIKELIHOOD

    def rows(self, part: str, pairs: Sequence[Pair], ask: Ask) -> list[Row]:
        """Return the row of each pair, those that are not there asked for and written down block by block."""
        for first in range(0, len(pairs), BLOCK):
            block = dict.fromkeys(pairs[first : first + BLOCK])
            new = [pair for pair in block if self.journal.get(part, pair[0].id, pair[1].key) is None]
            if new:
                keys = [dict(zip(KEY, (part, one.id, example.key), strict=True)) for one, example in new]
                self.journal.add([key | _finite(row) for key, row in zip(keys, ask(new), strict=True)])
                self.paid += len(new)
            self.report()
        found = (self.journal.get(part, candidate.id, example.key) for candidate, example in pairs)
        return [row for row in found if row is not None]

    def log_probs(self, variant: Variant) -> Array:
        """Return log_probs_JY of the labels at each example, what they get anyway not taken off."""
        ask = lambda pairs: [  # noqa: E731
            {"log_probs": log_probs_Y.tolist(), "tokens": tokens}
            for log_probs_Y, tokens in weigh_labels(self.speaker, variant.scoring, pairs)
        ]
        return np.array([row["log_probs"] for row in self.rows(variant.part, self._pairs(variant), ask)])

    def prior(self, variant: Variant) -> Array:
        """Return log_probs_Y that the labels get without any content (`kdjax.prompts.score.priors`)."""
        candidate = self.shown(variant)
        row = self.journal.get(variant.part, candidate.id, PRIOR)
        if row is None:
            (found,) = priors(self.speaker, variant.scoring, [candidate])
            row = dict(zip(KEY, (variant.part, candidate.id, PRIOR), strict=True))
            row |= _finite({"log_probs": list(found.log_probs), "tokens": found.tokens})
            self.journal.add([row])
        return np.array(row["log_probs"])

    def answers(self, variant: Variant) -> list[Row]:
        """Return a row for each example: the answer's `score`, the `tokens` read and written, what was `said`."""
        ask = lambda pairs: [vars(one) for one in evaluate(self.speaker, variant.scoring, pairs, {})]  # noqa: E731
        return self.rows(variant.part, self._pairs(variant), ask)

    def scores(self, variant: Variant, is_calibrated: bool | None = None) -> Array:
        """Return scores_J by the task's measure; of labels calibrated or not, by default as the scoring says."""
        if not self.scoring.by_labels:
            return np.array([row["score"] for row in self.answers(variant)])
        of = LABEL_SCORES[self.scoring.measure]
        pairs = zip(self._normalised(variant, is_calibrated), self.right(), strict=True)
        return np.array([of(log_probs_Y, right) for log_probs_Y, right in pairs])

    def probs(self, variant: Variant, is_calibrated: bool | None = None) -> Array:
        """Return probabilities probs_JY of the labels.

        Paper: Zhao et al. 2021, Calibrate Before Use, arXiv:2102.09690, section 5.
        """
        return np.exp(self._normalised(variant, is_calibrated))

    def _normalised(self, variant: Variant, is_calibrated: bool | None) -> Array:
        is_calibrated = self.scoring.calibrated if is_calibrated is None else is_calibrated
        prior_Y = self.prior(variant) if is_calibrated else np.zeros(len(self.scoring.labels))
        return np.array([log_softmax(log_probs_Y - prior_Y) for log_probs_Y in self.log_probs(variant)])

    def right(self) -> list[int]:
        """Return the number of each example's right label."""
        return [self.scoring.labels.index(example.answer) for example in self.examples]

    def _pairs(self, variant: Variant) -> list[Pair]:
        said = dict(zip(self.scoring.labels, variant.scoring.labels, strict=True))
        return [(self.shown(variant), _worded(example, said)) for example in self.examples]

    def shown(self, variant: Variant) -> Candidate:
        """Return the candidate as the variant shows it: with its words for the labels."""
        said = dict(zip(self.scoring.labels, variant.scoring.labels, strict=True))
        shots = tuple(_worded(shot, said) for shot in variant.candidate.shots)
        return replace(variant.candidate, shots=shots)


def _worded(example: Example, said: Mapping[str, str]) -> Example:
    return Example(example.input, said.get(example.answer, example.answer))


def _finite(row: Row) -> Row:
    """Return a row whose numbers have six digits, so that a value read again is the value written.

    Raises:
        UserError: a number that is not finite.
    """
    numbers = [value for values in row.values() for value in (values if isinstance(values, list) else [values])]
    if not all(math.isfinite(value) for value in numbers if isinstance(value, float)):
        raise UserError("the model gives a probability or score that is no number; its weights or its dtype are unfit")
    return {name: _rounded(value) for name, value in row.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
