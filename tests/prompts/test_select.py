"""The best of many is found for fewer evaluations than all; bounds and intervals are those of their formulas."""

import math

import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.prompts.select import SELECTORS, _bounds, halving, mean_interval, ucb


class Judge:
    """Scores are a planted quality of each candidate, a difficulty of each example, and noise of both."""

    def __init__(self, quality_Q, examples, noise=0.3, seed=0):
        rng = np.random.default_rng(seed)
        hard_J = rng.normal(0, 1, examples)
        self.scores_QJ = np.array(quality_Q)[:, None] + hard_J + rng.normal(0, noise, (len(quality_Q), examples))
        self.asked = []

    def __call__(self, pairs):
        self.asked += pairs
        return [self.scores_QJ[pair] for pair in pairs]

    def unknown(self):
        return np.full(self.scores_QJ.shape, np.nan)


QUALITY = [0.0] * 7 + [1.0] + [0.0] * 8


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("seed", range(5))
def test_the_planted_best_is_found_for_a_part_of_all_evaluations(selector, seed):
    judge = Judge(QUALITY, 100, seed=seed)
    budget = 400
    scores_QJ = judge.unknown()
    order = SELECTORS[selector](scores_QJ, judge, budget)
    assert order[0] == 7 and sorted(order) == list(range(16))
    assert len(judge.asked) == len(set(judge.asked)) <= budget < 16 * 100
    known = ~np.isnan(scores_QJ)
    assert known.sum() == len(judge.asked) and (scores_QJ[known] == judge.scores_QJ[known]).all()
    assert known[7].sum() > 2 * np.median(known.sum(axis=1))  # where it matters most is looked longest
    again = Judge(QUALITY, 100, seed=seed)
    assert SELECTORS[selector](again.unknown(), again, budget) == order and again.asked == judge.asked


def test_halving_spends_an_equal_share_a_round_on_the_same_examples():
    """16 candidates, 4 rounds of 16 evaluations: 1 example for 16, 2 more for 8, 4 more for 4, 8 more for 2."""
    judge = Judge(QUALITY, 50, noise=0.0)
    scores_QJ = judge.unknown()
    halving(scores_QJ, judge, 64)
    depths = sorted((~np.isnan(scores_QJ)).sum(axis=1).tolist())
    assert depths == [1] * 8 + [3] * 4 + [7] * 2 + [15] * 2 and len(judge.asked) == 64
    for known_J in ~np.isnan(scores_QJ):
        assert known_J[: known_J.sum()].all()


@pytest.mark.parametrize("selector", SELECTORS)
def test_what_is_known_is_not_asked_again_and_all_is_enough(selector):
    judge = Judge([0.0, 0.5, 1.0], 10, noise=0.0)
    scores_QJ = judge.unknown()
    scores_QJ[2, :4] = judge.scores_QJ[2, :4]
    order = SELECTORS[selector](scores_QJ, judge, 1000)
    assert order[0] == 2 and not {(2, j) for j in range(4)} & set(judge.asked) and len(judge.asked) <= 26
    one = Judge([0.0], 4)
    assert SELECTORS[selector](one.unknown(), one, 3) == [0]


@pytest.mark.parametrize("selector", SELECTORS)
def test_too_small_a_budget_is_refused(selector):
    judge = Judge(QUALITY, 10)
    with pytest.raises(UserError, match="too few to select among 16 candidates"):
        SELECTORS[selector](judge.unknown(), judge, 15)
    assert judge.asked == []


def test_bounds_are_those_of_the_formula():
    scores_QJ = np.array([[1.0, 3.0, np.nan], [0.0, np.nan, np.nan]])
    mean_Q, width_Q = _bounds(scores_QJ)
    sigma = math.sqrt((1 + 1) / 1)  # squares about the means of 2 and 0, one degree of freedom
    assert mean_Q.tolist() == [2.0, 0.0]
    np.testing.assert_allclose(width_Q, [sigma * math.sqrt(2 * math.log(3) / 2), sigma * math.sqrt(2 * math.log(3))])


def test_ucb_looks_where_little_is_known_and_trusts_luck_less():
    judge = Judge([0.0, 0.0], 30)
    judge.scores_QJ[0, :10], judge.scores_QJ[1] = [3, 5] * 5, [5, *[4] * 29]
    scores_QJ = judge.unknown()
    scores_QJ[0, :10], scores_QJ[1, 0] = judge.scores_QJ[0, :10], 3.8
    assert ucb(scores_QJ.copy(), judge, 2)[0] == 0 and judge.asked == [(1, 1), (1, 2)]  # 3.93 of three is less than 4
    scores_QJ[1, 0] = 5
    order = ucb(scores_QJ, judge, 2)  # means of 4.33 and 4, lower bounds of about 3.0 and 3.3
    assert order == [0, 1] and scores_QJ[1, :3].mean() > 4


def test_ucb_goes_by_scores_of_any_range():
    for scale in (1e-3, 1e3):
        judge = Judge(QUALITY, 60)
        judge.scores_QJ *= scale
        assert ucb(judge.unknown(), judge, 320)[0] == 7


def test_the_interval_is_that_of_the_mean():
    scores_J = np.random.default_rng(1).normal(2.0, 1.0, 400)
    mean, low, high = mean_interval(scores_J, seed=0)
    half = 1.96 * scores_J.std() / 20  # the normal approximation of the same interval
    assert mean == pytest.approx(scores_J.mean()) and low < mean < high
    np.testing.assert_allclose([mean - low, high - mean], [half, half], rtol=0.1)
    assert mean_interval(scores_J, 0) == mean_interval(scores_J, 0) != mean_interval(scores_J, 1)
    assert mean_interval([1.0, 1.0], 0) == (1.0, 1.0, 1.0)
