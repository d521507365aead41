"""What is said of students that were trained in several ways, from rows made by hand."""

import pytest

from benchmarks import quality, quality_table

HERE = {"device": "d", "platform": "cpu", "python": "3", "jax": "0", "commit": "c"}


def row(arm, rate, seed, *kls):
    curve = [[2 * n, 200 * n, kl, 1 + kl, 0.5, 4.0] for n, kl in enumerate(kls)]
    return {"what": "quality", "arm": arm, "rate": rate, "seed": seed, "curve": curve, "environment": HERE}


def pace(arm, seconds):
    return {"what": "pace", "arm": arm, "seconds": seconds, "rounds": 7, "environment": HERE}


ROWS = [
    row("supervised", 0.1, 0, 1.0, 0.7, 0.5),
    row("distilled", 0.1, 0, 1.0, 0.6, 0.2),
    row("half tried", 0.1, 0, 1.0, 0.1, 0.01),
    row("supervised", 0.2, 0, 1.0, 0.6, 0.4),
    row("distilled", 0.2, 0, 1.0, 0.9, 0.8),
    row("supervised", 0.2, 1, 1.0, 0.6, 0.6),
    row("distilled", 0.1, 1, 1.0, 0.4, 0.2),
    pace("supervised", 9.0),
    pace("supervised", 1.0),
]
WHOLE = [*ROWS, pace("distilled", 2.0)]


def said(rows):
    def interval(numbers):
        return sum(numbers) / len(numbers), max(numbers) - min(numbers)

    cells = [line.strip("| ").split(" | ") for line in quality_table.markdown(rows, interval).splitlines()[:-2]]
    return {head: line for head, *line in cells if line}


def test_the_best_rate_of_the_first_seed_is_that_of_all_seeds():
    assert quality_table.best_rate(WHOLE, "supervised") == 0.2 and quality_table.best_rate(WHOLE, "none") is None
    found = quality_table.chosen(WHOLE[::-1])
    assert {arm: [(row["rate"], row["seed"]) for row in rows] for arm, rows in found.items()} == {
        "distilled": [(0.1, 0), (0.1, 1)],
        "supervised": [(0.2, 0), (0.2, 1)],
    }, "an arm that has tried fewer rates than the others is not shown"


def test_arms_are_compared_pair_by_pair_and_after_equal_seconds():
    found = said(WHOLE)
    assert list(found) == ["trained by", "supervised", "distilled"] and found["trained by"][-1] == "KL after 4 s"
    rate, seeds, kl, less, _, _, step, then = found["distilled"]
    assert (rate, seeds, kl, step) == ("0.1", "2", "0.2000 ± 0.0000", "2.000 s")
    assert less == "0.3000 ± 0.2000", "0.4 − 0.2 and 0.6 − 0.2"
    assert then == "0.5000 ± 0.2000", "supervised has taken 4 steps after 4 seconds, this one 2"
    assert found["supervised"][3] == "–" and found["supervised"][-1] == "0.5000 ± 0.2000"


def test_a_step_that_was_not_timed_is_not_made_up():
    assert said(ROWS)["distilled"][-2:] == ["–", "–"] and said(ROWS)["supervised"][-2] == "1.000 s"
    assert quality_table.markdown([], max).startswith("Not measured yet")


def test_a_line_is_drawn_beside_tokens_and_beside_seconds():
    tokens, seconds = quality_table.picture(WHOLE).axes
    lines = [{line.get_label(): line for line in ax.lines} for ax in (tokens, seconds)]
    assert list(lines[0]["distilled"].get_xdata()) == [200, 400]
    assert list(lines[1]["distilled"].get_xdata()) == [4, 8] and list(lines[1]["supervised"].get_xdata()) == [2, 4]
    assert list(lines[1]["distilled"].get_ydata()) == pytest.approx([0.5, 0.2])


def test_what_is_not_timed_is_drawn_beside_tokens_alone(tmp_path):
    figure = quality_table.picture([row for row in ROWS if row["what"] == "quality"])
    figure.savefig(tmp_path / "drawn.svg")
    assert [len(ax.lines) for ax in figure.axes] == [2, 0] and (tmp_path / "drawn.svg").stat().st_size > 1000


def test_other_seeds_wait_until_all_rates_are_tried():
    arms, rates = ["supervised", "distilled", "half tried"], len(quality.RATES)
    kept = [row(arm, rate, 0, 1.0, rate) for arm in arms for rate in quality.RATES]
    missing = [one for one in kept if (one["arm"], one["rate"]) == ("half tried", quality.RATES[1])]
    known = [one for one in kept if one not in missing]
    assert list(quality.left(known, arms, 3, rates)) == [("half tried", quality.RATES[1], 0)]
    best = min(quality.RATES)
    assert list(quality.left(kept, arms, 3, rates)) == [(arm, best, seed) for seed in (1, 2) for arm in arms]
    assert not list(quality.left(kept, arms, 1, rates))
