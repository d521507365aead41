"""Which of many candidates is best, for a budget of evaluations; and how sure one may be of a mean.

Scores are an array of candidates and examples, NaN where nothing was paid for yet. All candidates see the examples in
the same order, so that they are compared on the same ones. To add a way: a row in `SELECTORS` at the foot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from kdjax.errors import UserError
from kdjax.shapes import Array

Ask = Callable[[Sequence[tuple[int, int]]], Sequence[float]]
"""The scores of pairs (number of a candidate, number of an example)."""

Selector = Callable[[Array, Ask, int], list[int]]
"""``selector(scores_QJ, ask, budget)``: fills in scores that it asks for, `budget` at most; returns candidates, the
best first."""

UCB_EXAMPLES = 4
"""Examples that are asked for at once of a candidate."""


def halving(scores_QJ: Array, ask: Ask, budget: int) -> list[int]:
    """Return the candidates by successive halving: all on a few examples, the better half on more, and so on.

    Each of the ⌈log2 Q⌉ rounds gets an equal share of what is left of the budget.
    Paper: Karnin et al. 2013, Almost Optimal Exploration in Multi-Armed Bandits, ICML, algorithm 1.

    Raises:
        UserError: the budget is too small for one example of each candidate in the first round.
    """
    alive, out, depth = list(range(len(scores_QJ))), list[int](), 0
    rounds = max(1, math.ceil(math.log2(len(alive))))
    _check(budget, len(alive), rounds * len(alive))
    for number in range(rounds):
        depth = _deeper(scores_QJ, alive, depth, budget // (rounds - number))
        budget -= _fill(scores_QJ, ask, [(q, j) for q in alive for j in range(depth)])
        ranked = sorted(alive, key=lambda q: -scores_QJ[q, :depth].mean())
        kept = math.ceil(len(alive) / 2)
        alive, out = ranked[:kept], [*ranked[kept:], *out]
    return [*alive, *out]


def _deeper(scores_QJ: Array, alive: Sequence[int], depth: int, share: int) -> int:
    """Return how many examples all of `alive` can have for a share of the budget; those known cost nothing."""
    cost = 0
    while depth < scores_QJ.shape[1]:
        cost += int(np.isnan(scores_QJ[alive, depth]).sum())
        if cost > share:
            break
        depth += 1
    return depth


def ucb(scores_QJ: Array, ask: Ask, budget: int) -> list[int]:
    """Return the candidates by their lower bounds, the budget spent where the upper bound mean + width is highest.

    width = σ·√(2·ln t / n) after n of t evaluations, σ the standard deviation within candidates: scores have no common
    range. Paper: Auer et al. 2002, Finite-time Analysis of the Multiarmed Bandit Problem, Machine Learning 47, fig. 1.

    Raises:
        UserError: the budget is too small for one example of each candidate.
    """
    count, examples = scores_QJ.shape
    _check(budget, count, count)
    budget -= _fill(scores_QJ, ask, [(q, 0) for q in range(count)])
    while budget > 0 and np.isnan(scores_QJ).any():
        mean_Q, width_Q = _bounds(scores_QJ)
        upper_Q = np.where(np.isnan(scores_QJ).any(axis=1), mean_Q + width_Q, -np.inf)
        wanted = []
        for q in np.argsort(-upper_Q, kind="stable")[: max(1, count // 4)]:
            unknown = np.flatnonzero(np.isnan(scores_QJ[q]))[:UCB_EXAMPLES] if np.isfinite(upper_Q[q]) else []
            wanted += [(int(q), int(j)) for j in unknown]
        budget -= _fill(scores_QJ, ask, wanted[:budget])
    mean_Q, width_Q = _bounds(scores_QJ)
    return np.argsort(width_Q - mean_Q, kind="stable").tolist()


def _bounds(scores_QJ: Array) -> tuple[Array, Array]:
    """Return each candidate's mean, and the width of its bounds."""
    known_Q = (~np.isnan(scores_QJ)).sum(axis=1)
    mean_Q = np.nanmean(scores_QJ, axis=1)
    freedom = max(1, int((known_Q - 1).sum()))
    sigma = math.sqrt(float(np.nansum((scores_QJ - mean_Q[:, None]) ** 2)) / freedom) or 1.0
    return mean_Q, sigma * np.sqrt(2 * math.log(max(2, known_Q.sum())) / known_Q)


def _fill(scores_QJ: Array, ask: Ask, pairs: Sequence[tuple[int, int]]) -> int:
    """Ask for those of the pairs that are unknown; return how many."""
    pairs = [(q, j) for q, j in pairs if np.isnan(scores_QJ[q, j])]
    for (q, j), score in zip(pairs, ask(pairs) if pairs else (), strict=True):
        scores_QJ[q, j] = score
    return len(pairs)


def _check(budget: int, candidates: int, least: int) -> None:
    if budget < least:
        raise UserError(
            f"{budget} evaluations a round are too few to select among {candidates} candidates; wanted at least "
            f"{least}: raise budget, or make fewer candidates (children, methods, rounds)"
        )


def mean_interval(scores_J: Array, seed: int, draws: int = 2_000) -> tuple[float, float, float]:
    """Return the mean, and the 95 % interval of the mean by the bootstrap's percentiles.

    Paper: Efron 1979, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 7.
    """
    scores_J = np.asarray(scores_J, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(scores_J), (draws, len(scores_J)))
    low, high = np.percentile(scores_J[drawn].mean(axis=1), (2.5, 97.5))
    return float(scores_J.mean()), float(low), float(high)


def interval(scores_J: Array, seed: int) -> dict[str, float]:
    """Return `score`, the mean over examples, and the ends of its 95 % bootstrap interval, `low` and `high`."""
    return dict(zip(("score", "low", "high"), mean_interval(scores_J, seed), strict=True))


SELECTORS: dict[str, Selector] = {"halving": halving, "ucb": ucb}
"""Ways to spend a budget."""
