"""Figures on a prompt's effect, against values worked out by hand."""

import numpy as np
import pytest

from kdjax.prompts.effect_figures import break_even, by_position, calibration, spread


def test_calibration_error_is_that_worked_out_by_hand():
    """Confidences 0.5 (on a border: lower bin), 0.55, 0.95, 0.95, right or not 1 0 1 0, in ten bins."""
    top = np.array([0.5, 0.55, 0.95, 0.95])
    probs_JY = np.stack([top, 1 - top], axis=1)
    probs_JY[0] = (0.3, 0.5)  # the likeliest is the second one
    found = calibration(probs_JY, np.array([1, 1, 0, 1]), 10)
    assert found["ece"] == pytest.approx((1 * abs(1 - 0.5) + 1 * abs(0 - 0.55) + 2 * abs(0.5 - 0.95)) / 4)
    assert found["accuracy"] == 0.5 and found["confidence"] == pytest.approx(2.95 / 4)
    assert [(one["from"], one["to"], one["examples"], one["accuracy"]) for one in found["curve"]] == [
        (0.4, 0.5, 1, 1.0), (0.5, 0.6, 1, 0.0), (0.9, 1.0, 2, 0.5),
    ]  # fmt: skip
    one_bin = calibration(probs_JY, np.array([1, 1, 0, 1]), 1)
    assert one_bin["ece"] == pytest.approx(abs(0.5 - 2.95 / 4)) and len(one_bin["curve"]) == 1


def test_calibrated_probabilities_have_no_error_and_certain_wrong_ones_all():
    probs_JY = np.tile([0.75, 0.25], (4, 1))
    assert calibration(probs_JY, np.array([0, 0, 0, 1]), 10)["ece"] == pytest.approx(0)
    assert calibration(np.tile([1.0, 0.0], (3, 1)), np.ones(3), 10)["ece"] == 1


def test_a_spread_has_the_ends_and_an_interval_over_examples():
    scores_VJ = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0.0]])
    found = spread(["a", "b", "c"], scores_VJ, 0)
    assert (found["score"], found["lowest"], found["highest"]) == (0.5, 0, 1)
    assert found["low"] >= 1 / 3 and found["high"] <= 2 / 3  # of the examples' means 1/3, 1/3, 2/3, 2/3
    assert [(one["name"], one["score"]) for one in found["variants"]] == [("a", 0.5), ("b", 1), ("c", 0)]


def test_a_position_is_the_mean_of_the_answers_that_have_it():
    found = by_position([[1.0, 2.0], [3.0], [5.0, 4.0, 7.0]], 0)
    assert [(one["position"], one["examples"], one["score"]) for one in found] == [(0, 3, 3), (1, 2, 3), (2, 1, 7)]
    assert found[0]["low"] < 3 < found[0]["high"] and found[2]["low"] == found[2]["high"] == 7


@pytest.mark.parametrize(
    ("paid", "with_prompt", "without", "requests"),
    [(100, 0.5, 0.25, 400), (1, 0.4, 0.1, 4), (0, 2, 1, 0), (100, 0.25, 0.25, None), (100, 0.2, 0.25, None)],
)
def test_a_distillation_pays_once_its_seconds_are_saved_or_never(paid, with_prompt, without, requests):
    assert break_even(paid, with_prompt, without) == requests
