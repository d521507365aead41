"""How good the winner is on examples that nothing has seen, and beside what one would have had without a search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from kdjax.prompts.bench import Bench, rank
from kdjax.prompts.score import Evaluation
from kdjax.prompts.select import Selector, interval
from kdjax.prompts.splits import Splits
from kdjax.prompts.tasks import Candidate

TRIED = 4
"""Sets of examples by which it is estimated what an evaluation of one takes."""


@dataclass(frozen=True)
class Baseline:
    """Sets of `shots` worked examples, selected among at the tokens that the search took; 0 shots: no such baseline."""

    selector: Selector
    shots: int


def verdict(
    bench: Bench,
    splits: Splits,
    candidates: Sequence[Candidate],
    best: Candidate,
    selected_by: float,
    baseline: Baseline,
    seed: int,
) -> dict[str, Any]:
    """Return what the winner scores on the examples to report on, what others do, and the differences.

    `test` has means with 95 % intervals, `gains` those of the winner's score less another one's at the same example.
    `random` is each example by a candidate drawn: what one may expect of choosing among the same candidates at random.
    `commonest`, where accuracy is measured, is what the label that is commonest among the examples to select by has.
    `gap` is what the winner lost from selection to report: that it was chosen makes its selection score too high.
    """
    draw = Random(seed)
    rivals = {"first": [candidates[0]] * len(splits.test), "random": _dealt(candidates, len(splits.test), draw)}
    if baseline.shots:
        rivals["few_shot"] = [_few_shot(bench, splits, candidates, baseline, draw)] * len(splits.test)
    found = _tested(bench, splits, [best] * len(splits.test))
    best_J = _scores(found)
    test, gains = {"best": interval(best_J, seed)}, {}
    scores = {name: _scores(_tested(bench, splits, chosen)) for name, chosen in rivals.items()}
    if bench.scoring.measure == "accuracy":
        label = Counter(example.answer for example in splits.select).most_common(1)[0][0]
        scores["commonest"] = np.array([float(example.answer == label) for example in splits.test])
    for name, scores_J in scores.items():
        test[name], gains[name] = interval(scores_J, seed), interval(best_J - scores_J, seed)
    said = [one.said for one in found]
    corpus = {name: measure(said) for name, measure in bench.scoring.task.corpus.items()}
    return {"test": test, "gains": gains, "gap": selected_by - test["best"]["score"], "corpus": corpus}


def _dealt(candidates: Sequence[Candidate], count: int, draw: Random) -> list[Candidate]:
    """Return a candidate for each of so many examples, at random, each as often as the others but for one time."""
    found: list[Candidate] = []
    while len(found) < count:
        found += draw.sample(list(candidates), len(candidates))
    return found[:count]


def _few_shot(
    bench: Bench, splits: Splits, candidates: Sequence[Candidate], baseline: Baseline, draw: Random
) -> Candidate:
    """Return the best set of worked examples behind the first instruction, for the tokens that the search has taken.

    As many sets as there were candidates, or as the tokens are enough for.
    """
    part, tokens = "few_shot", bench.tokens["select"] + bench.tokens["propose"]
    text, examples = candidates[0].text or bench.scoring.task.instruction, list(splits.propose)
    shots = min(baseline.shots, len(examples))
    sets = [Candidate(text, tuple(draw.sample(examples, shots)), part) for _ in candidates]
    tried = bench.ask(part, [(one, splits.select[0]) for one in sets[:TRIED]])
    each = sum(one.tokens for one in tried) / len(tried)
    prior = bench.tokens[part] / len(tried) - each
    count = len(sets)
    while count > 1 and (tokens - count * prior) / each < count * math.ceil(math.log2(count)):
        count -= 1
    budget = int((tokens - count * prior) / each)
    return rank(bench, part, sets[:count], splits.select, baseline.selector, max(budget, count))[0][0]


def _tested(bench: Bench, splits: Splits, candidates: Sequence[Candidate]) -> list[Evaluation]:
    return bench.ask("test", list(zip(candidates, splits.test, strict=True)))


def _scores(found: Sequence[Evaluation]) -> np.ndarray:
    return np.array([one.score for one in found])
