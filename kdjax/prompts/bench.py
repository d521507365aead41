"""Candidates evaluated at examples, each pair paid for once, whatever asks and however often the job is begun."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdjax.errors import UserError
from kdjax.prompts.journal import Journal, Row, plain
from kdjax.prompts.score import Evaluation, Pair, Prior, Scoring, evaluate, priors
from kdjax.prompts.select import Selector
from kdjax.prompts.speaker import Speaker
from kdjax.prompts.tasks import Candidate, Example
from kdjax.shapes import Array

KEY = ("part", "candidate", "example")
"""What an evaluation is known by, in evaluations.jsonl."""

BLOCK = 64
"""Evaluations that are asked of a local model, and written down, together."""

PRIOR = "content-free"
"""The `example` of the row that has a candidate's prior."""


@dataclass
class Bench:
    """Where candidates are evaluated.

    Attributes:
        speaker: answers.
        scoring: measures.
        journal: what was paid for, in this process or an earlier one.
        report: called after every block.
        block: evaluations that are asked, and written down, together: those that a kill may lose.
        spent: evaluations by part, counted as if no earlier process had paid: a job that was killed counts as one.
        tokens: that they took, by part.
    """

    speaker: Speaker
    scoring: Scoring
    journal: Journal
    report: Callable[[], None] = lambda: None
    block: int = BLOCK
    spent: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    _counted: set[tuple[str, ...]] = field(default_factory=set)

    def ask(self, part: str, pairs: Sequence[Pair]) -> list[Evaluation]:
        """Return what each candidate is worth at its example.

        Args:
            part: for which the evaluations are counted: the same pair in two parts is paid for in each.
            pairs: what is evaluated.

        Raises:
            UserError: a score that is not finite.
        """
        for first in range(0, len(pairs), self.block):
            block = list(dict.fromkeys(pairs[first : first + self.block]))
            known = self._priors(part, [candidate for candidate, _ in block]) if self.scoring.needs_priors else {}
            new = [pair for pair in block if self.journal.get(part, pair[0].id, pair[1].key) is None]
            if new:
                self.journal.add(self._evaluated(part, new, known))
            for candidate, example in block:
                self._count(self._row(part, candidate.id, example.key))
            self.report()
        rows = (self._row(part, candidate.id, example.key) for candidate, example in pairs)
        return [Evaluation(row["score"], row["tokens"], row["said"]) for row in rows]

    def known(self, part: str, candidate: Candidate, example: Example) -> float:
        """Return the score of a pair that was asked for before, NaN of another."""
        is_known = (part, candidate.id, example.key) in self._counted
        return self._row(part, candidate.id, example.key)["score"] if is_known else math.nan

    def _evaluated(self, part: str, pairs: Sequence[Pair], known: Mapping[str, Prior]) -> list[Row]:
        """Return the row of each evaluation, made now."""
        rows = []
        for (candidate, example), one in zip(pairs, evaluate(self.speaker, self.scoring, pairs, known), strict=True):
            if not math.isfinite(one.score):
                raise UserError(
                    f"{self.speaker.name} gives a score of {one.score} at {example.input[:60]!r}; its weights or its "
                    "dtype are unfit"
                )
            rows.append(plain({"part": part, "candidate": candidate.id, "example": example.key, **vars(one)}))
        return rows

    def _priors(self, part: str, candidates: Sequence[Candidate]) -> dict[str, Prior]:
        """Return the prior of each candidate by its id."""
        unique = list(dict.fromkeys(candidates))
        new = [candidate for candidate in unique if self.journal.get(part, candidate.id, PRIOR) is None]
        if new:
            found = zip(new, priors(self.speaker, self.scoring, new), strict=True)
            self.journal.add([{"part": part, "candidate": c.id, "example": PRIOR, **vars(p)} for c, p in found])
        rows = [self._row(part, candidate.id, PRIOR) for candidate in unique]
        for row in rows:
            self._count(row)
        return {row["candidate"]: Prior(tuple(row["log_probs"]), row["tokens"]) for row in rows}

    def _row(self, part: str, candidate: str, example: str) -> Row:
        row = self.journal.get(part, candidate, example)
        if row is None:
            raise KeyError((part, candidate, example))
        return row

    def _count(self, row: Row) -> None:
        key = tuple(row[name] for name in KEY)
        if key not in self._counted:
            self._counted.add(key)
            self.tokens[row["part"]] += row["tokens"]
            self.spent[row["part"]] += row["example"] != PRIOR


def rank(
    bench: Bench,
    part: str,
    candidates: Sequence[Candidate],
    examples: Sequence[Example],
    selector: Selector,
    budget: int,
) -> tuple[list[Candidate], Array]:
    """Return the candidates, the best first, and their scores_QJ, NaN where nothing was paid for."""

    def ask(pairs: Sequence[tuple[int, int]]) -> list[float]:
        return [one.score for one in bench.ask(part, [(candidates[q], examples[j]) for q, j in pairs])]

    scores_QJ = np.array([[bench.known(part, one, example) for example in examples] for one in candidates])
    order = selector(scores_QJ, ask, budget)
    return [candidates[q] for q in order], scores_QJ
