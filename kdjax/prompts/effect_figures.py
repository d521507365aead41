"""Figures on a prompt's effect, from arrays of scores: means with intervals, spreads, calibration, break-even."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdjax.prompts.select import interval
from kdjax.shapes import Array

Figures = dict[str, Any]


def spread(names: Sequence[str], scores_VJ: Array, seed: int) -> Figures:
    """Return the mean over variants with its interval, the lowest and the highest variant's score, and each one's.

    All variants are measured on the same examples; the interval is over examples.
    Paper: Sclar et al. 2023, Quantifying Language Models' Sensitivity to Spurious Features, arXiv:2310.11324.
    """
    means_V = scores_VJ.mean(axis=1)
    ends = {"lowest": float(means_V.min()), "highest": float(means_V.max())}
    each = [{"name": name, **interval(scores_J, seed)} for name, scores_J in zip(names, scores_VJ, strict=True)]
    return interval(scores_VJ.mean(axis=0), seed) | ends | {"variants": each}


def calibration(probs_JY: Array, right_J: Array, bins: int) -> Figures:
    """Return the expected calibration error of the likeliest labels' probabilities, and the reliability curve.

    `ece` = Σ_b n_b/n · |accuracy_b − confidence_b| over bins of equal width; a confidence on a border is in the lower
    bin. `curve` has the bins that are not empty. Paper: Guo et al. 2017, On Calibration, arXiv:1706.04599, eq. 3.
    """
    confidence_J, is_right_J = probs_JY.max(axis=1), probs_JY.argmax(axis=1) == right_J
    bin_J = np.clip(np.ceil(confidence_J * bins).astype(int) - 1, 0, bins - 1)
    curve = []
    for number in np.unique(bin_J).tolist():
        here_J = bin_J == number
        means = {"confidence": float(confidence_J[here_J].mean()), "accuracy": float(is_right_J[here_J].mean())}
        curve.append({"from": number / bins, "to": (number + 1) / bins, "examples": int(here_J.sum()), **means})
    gaps = [one["examples"] * abs(one["accuracy"] - one["confidence"]) for one in curve]
    means = {"accuracy": float(is_right_J.mean()), "confidence": float(confidence_J.mean())}
    return {"ece": sum(gaps) / len(probs_JY), **means, "curve": curve}


def by_position(values: Sequence[Sequence[float]], seed: int) -> list[Figures]:
    """Return for each position of an answer the mean over the examples that have it, its interval and their number."""
    longest = max(map(len, values))
    found = []
    for position in range(longest):
        here = np.array([row[position] for row in values if position < len(row)])
        found.append({"position": position, "examples": len(here), **interval(here, seed)})
    return found


def break_even(paid_seconds: float, with_prompt: float, without: float) -> int | None:
    """Return after how many requests the seconds that a distillation took are saved again; None: never."""
    saved = with_prompt - without
    return math.ceil(paid_seconds / saved) if saved > 0 else None
