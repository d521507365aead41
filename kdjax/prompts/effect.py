"""How far a prompt's score spreads when what should not matter is varied, and what worked examples add.

To add something that is varied: a row in `VARIATIONS` at the foot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from random import Random
from typing import Any

import numpy as np

from kdjax.prompts.config import EffectConfig
from kdjax.prompts.effect_figures import Figures, calibration, spread
from kdjax.prompts.effect_ledger import Ledger, Variant
from kdjax.prompts.score import Scoring
from kdjax.prompts.select import interval
from kdjax.prompts.tasks import Candidate, Example
from kdjax.shapes import Array


@dataclass(frozen=True)
class Study:
    """One prompt that is varied.

    Attributes:
        config: what is varied, and how far.
        scoring: of the task.
        candidate: the prompt, with worked examples.
        pool: examples that may be shown.
    """

    config: EffectConfig
    scoring: Scoring
    candidate: Candidate
    pool: Sequence[Example]

    def drawn(self, count: int, draw: int) -> Candidate:
        """Return the prompt with so many worked examples, those of a numbered draw; a smaller one begins a larger."""
        order = Random(f"{self.config.prompts.seed} {draw}").sample(list(self.pool), len(self.pool))
        return replace(self.candidate, shots=tuple(order[:count]))


def orders(study: Study) -> list[Variant]:
    """Return the prompt with the same worked examples in several orders.

    Paper: Lu et al. 2021, Fantastically Ordered Prompts, arXiv:2104.08786.
    """
    shots = study.candidate.shots
    draw, count = Random(study.config.prompts.seed), min(study.config.orders, math.factorial(len(shots)))
    if len(shots) < 5:
        found = draw.sample(list(permutations(shots)), count)
    else:
        found = list(dict.fromkeys(tuple(draw.sample(shots, len(shots))) for _ in range(2 * count)))[:count]
    return [Variant(f"order {n}", replace(study.candidate, shots=one), study.scoring) for n, one in enumerate(found, 1)]


def draws(study: Study) -> list[Variant]:
    """Return the prompt with other worked examples, as many."""
    count = len(study.candidate.shots)
    return [
        Variant(f"draw {n + 1}", study.drawn(count, n), study.scoring)
        for n in range(study.config.draws if count else 0)
    ]


def formats(study: Study) -> list[Variant]:
    """Return the prompt in each of `FORMATS`."""
    return [
        Variant(name, study.candidate, replace(study.scoring, task=replace(study.scoring.task, **how)), name)
        for name, how in FORMATS.items()
    ]


def words(study: Study) -> list[Variant]:
    """Return the prompt with other words for the labels."""
    labels, found = study.scoring.labels, dict[tuple[str, ...], str]()
    if not study.scoring.by_labels:
        return []
    for name, of in CASES.items():
        found.setdefault(tuple(map(of, labels)), name)
    for text in study.config.label_sets:
        found.setdefault(tuple(word.strip() for word in text.split(",")), text)
    return [
        Variant(name, study.candidate, replace(study.scoring, labels=said), "plain" if said == labels else f"as {name}")
        for said, name in found.items()
        if len(set(said)) == len(labels)
    ]


FORMATS: dict[str, dict[str, Any]] = {
    "Input, Output": {"words": ("Input", "Output")},
    "Q, A": {"words": ("Q", "A")},
    "a dash for the colon": {"colon": " -"},
    "answers on the same line": {"between": " "},
    "no blank lines": {"apart": "\n"},
}
"""What a format changes of the task, by name."""

CASES: dict[str, Callable[[str], str]] = {
    "as in the data": str,
    "upper case": str.upper,
    "lower case": str.lower,
    "capitalised": str.capitalize,
}
"""Ways to write a label."""

VARIATIONS: dict[str, Callable[[Study], list[Variant]]] = {
    "order of the worked examples": orders,
    "choice of the worked examples": draws,
    "format": formats,
    "words of the labels": words,
}
"""What is varied, by name; a variation with fewer than two variants is left out."""


def sensitivity(ledger: Ledger, study: Study) -> dict[str, Figures]:
    """Return for each of `VARIATIONS` mean, spread and interval over its variants, the plain prompt among them."""
    plain, found = Variant("as given", study.candidate, study.scoring), {}
    for name, of in VARIATIONS.items():
        variants: dict[tuple[str, str], Variant] = {}
        for one in [plain, *of(study)]:
            variants.setdefault((one.part, one.candidate.id), one)
        if len(variants) > 1:
            scores_VJ = np.stack([ledger.scores(one) for one in variants.values()])
            found[name] = spread([one.name for one in variants.values()], scores_VJ, study.config.prompts.seed)
    return found


def counts(most: int) -> list[int]:
    """Return 0, 1, 2, 4, 8, … up to a number."""
    return [0, *(2**n for n in range(most.bit_length()) if 2**n <= most)]


def by_shots(ledger: Ledger, study: Study, most: int) -> Figures:
    """Return the score by number of worked examples, labels calibrated and not, and what the most gain over none."""
    ways = {"calibrated": True, "plain": False} if ledger.scoring.by_labels else {"plain": None}
    seed, rows = study.config.prompts.seed, []
    scores: dict[str, list[Array]] = {way: [] for way in ways}
    for count in counts(most):
        variants = [
            Variant("", study.drawn(count, n), study.scoring) for n in range(study.config.draws if count else 1)
        ]
        row: Figures = {"shots": count}
        for way, is_calibrated in ways.items():
            scores_VJ = np.stack([ledger.scores(one, is_calibrated) for one in variants])
            row[way] = spread([f"draw {n + 1}" for n in range(len(variants))], scores_VJ, seed)
            scores[way].append(scores_VJ.mean(axis=0))
        rows.append(row)
    gains = {way: interval(of_count[-1] - of_count[0], seed) for way, of_count in scores.items()}
    return {"counts": rows, "gain": gains}


def calibrations(ledger: Ledger, variants: Mapping[str, Variant], bins: int) -> dict[str, dict[str, Figures]]:
    """Return of each variant the calibration of its label probabilities, contextually calibrated and not."""
    right_J = np.array(ledger.right())
    return {
        name: {
            way: calibration(ledger.probs(variant, is_calibrated), right_J, bins)
            for way, is_calibrated in (("calibrated", True), ("plain", False))
        }
        for name, variant in variants.items()
    }
