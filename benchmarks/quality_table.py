"""What benchmarks.quality measured, as a table in Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness
from kdjax.console import count, percent

FIGURES = ("kl", "perplexity", "agreement", "teacher_perplexity")
CURVE = ("step", "tokens", *FIGURES)
"""A point of a row's curve. Rows of `what` "pace" say how many seconds an arm's step takes, all arms' in turn."""


def last(row: harness.Row, name: str) -> float:
    """Return a figure at the end of a row's curve."""
    return row["curve"][-1][CURVE.index(name)]


def curves(rows: Sequence[harness.Row]) -> list[harness.Row]:
    """Return the rows that are a student's."""
    return [row for row in rows if row["what"] == "quality"]


def paces(rows: Sequence[harness.Row]) -> dict[str, float]:
    """Return the seconds of each arm's step, by the newest row of each."""
    return {row["arm"]: row["seconds"] for row in rows if row["what"] == "pace"}


def at_seconds(row: harness.Row, seconds: float, pace: float) -> float:
    """Return the KL after so many seconds of training, between two looks on the straight line between them."""
    curve = np.array(row["curve"])
    return float(np.interp(seconds, pace * curve[:, CURVE.index("step")], curve[:, CURVE.index("kl")]))


def best_rate(rows: Sequence[harness.Row], arm: str) -> float | None:
    """Return the learning rate at which an arm's first seed ends with the lowest KL; None before it has any."""
    tried = {row["rate"]: last(row, "kl") for row in curves(rows) if row["arm"] == arm and row["seed"] == 0}
    return min(tried, key=lambda rate: tried[rate]) if tried else None


def chosen(rows: Sequence[harness.Row]) -> dict[str, list[harness.Row]]:
    """Return of each arm, in the order first seen, the rows at its best rate, a seed each.

    An arm that has tried fewer rates than another is left out.
    """
    tried: dict[str, set[float]] = {}
    for row in curves(rows):
        tried.setdefault(row["arm"], set()).add(row["rate"])
    most = max(map(len, tried.values()), default=0)
    of = {arm: best_rate(rows, arm) for arm, rates in tried.items() if len(rates) == most}
    return {
        arm: sorted(
            (row for row in curves(rows) if (row["arm"], row["rate"]) == (arm, rate)), key=lambda row: row["seed"]
        )
        for arm, rate in of.items()
    }


def markdown(rows: Sequence[harness.Row], interval: Callable[[Sequence[float]], tuple[float, float]]) -> str:
    """Return the table of benchmarks/README.md.

    Args:
        rows: all there are.
        interval: of the mean of some numbers, and half the width of its 95 % interval.
    """
    arms, pace = chosen(rows), paces(rows)
    if not arms:
        return "Not measured yet: `python -m benchmarks.quality` writes the figures that stand here."
    timed = [pace[arm] * last(row, "step") for arm, found in arms.items() if arm in pace for row in found]
    budget = min(timed, default=0.0)
    plain = {row["seed"]: last(row, "kl") for row in arms.get("supervised", [])}

    def said(numbers: Sequence[float], shown: Callable[[float], str]) -> str:
        mean, half = interval(numbers)
        return f"{shown(mean)} ± {shown(half)}" if len(numbers) > 1 else shown(mean)

    nats = "{:.4f}".format
    heads = ["trained by", "rate", "seeds", "KL to the teacher (nats)", "less than supervised, pair by pair"]
    heads += ["perplexity", "agreement", "a step", f"KL after {budget:.0f} s"]
    lines = [f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
    for arm, found in arms.items():
        less = [plain[row["seed"]] - last(row, "kl") for row in found if row["seed"] in plain]
        then = [at_seconds(row, budget, pace[arm]) for row in found if arm in pace]
        cells = [
            arm,
            format(found[0]["rate"], "g"),
            str(len(found)),
            said([last(row, "kl") for row in found], nats),
            "–" if arm == "supervised" or not less else said(less, nats),
            said([last(row, "perplexity") for row in found], "{:.3f}".format),
            said([last(row, "agreement") for row in found], percent),
            f"{pace[arm]:.3f} s" if arm in pace else "–",
            said(then, nats) if then else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    row = next(iter(arms.values()))[-1]
    return "\n".join(
        [
            *lines,
            "",
            "![Held-out KL beside tokens and seconds](../docs/quality.svg)",
            "",
            f"{count(last(row, 'tokens'))} tokens of training each; mean over seeds with its 95 % interval (Student's "
            f"t). The teacher's own perplexity is {last(row, 'teacher_perplexity'):.3f}. "
            f"{_measured_on(rows, row)}.",
        ]
    )


def _measured_on(rows: Sequence[harness.Row], row: harness.Row) -> str:
    timed = [row for row in rows if row["what"] == "pace"]
    said = f"Trained on {harness.measured_on(row['environment'])}"
    if not timed:
        return said
    rounds, where = timed[-1]["rounds"], harness.measured_on(timed[-1]["environment"])
    return f"{said}. Steps timed in turn, medians of {rounds} rounds, on {where}"


def picture(rows: Sequence[harness.Row]) -> Figure:
    """Return held-out KL beside tokens and, where steps are timed, beside seconds; a line an arm, its seeds' mean."""
    figure, pace = Figure(figsize=(11, 4.6), layout="constrained"), paces(rows)
    axes = figure.subplots(1, 2, sharey=True)
    for n, (arm, found) in enumerate(chosen(rows).items()):
        curve = np.mean([row["curve"] for row in found], axis=0)[1:]
        of: Mapping[str, np.ndarray] = dict(zip(CURVE, curve.T, strict=True))
        style = "--" if arm.startswith("TRL") else ":" if "reverse" in arm else "-"
        beside = [of["tokens"], *([of["step"] * pace[arm]] if arm in pace else [])]
        for ax, x in zip(axes, beside, strict=False):
            ax.plot(x, of["kl"], style, color=f"C{n}", lw=1.6, marker="o", ms=3, label=arm)
    axes[0].set(ylabel="held-out KL to the teacher, nats a token", xlabel="tokens of training", yscale="log")
    axes[1].set(xlabel="seconds of training", xscale="log")
    axes[0].legend(frameon=False, fontsize="small")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, which="both")
    return figure
