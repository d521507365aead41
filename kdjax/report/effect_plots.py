"""The plots of a page on a prompt's effect, as SVG in the page's own colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kdjax.report.plots import DASHES, MUTED, drawn

Json = Mapping[str, Any]

BLUE, ORANGE = "#000010", "#000011"
# The first two curves of the style sheet, by what stands for them in a plot.
WAYS = {"plain": (ORANGE, "labels as they are"), "calibrated": (BLUE, "labels calibrated")}


def effect_plots(found: Json) -> list[Markup]:
    """Return the plots of which an analysis has something."""
    known = [(title, draw) for title, (has, draw) in PLOTS.items() if has(found)]
    return [
        drawn(title, lambda axes, draw=draw: draw(axes, found), f"effect{n}-") for n, (title, draw) in enumerate(known)
    ]


def _scores(axes: Axes, found: Json) -> None:
    rows = [*found["prompts"], found["without"]]
    names = [f"prompt {n}" for n in range(1, len(rows))] + ["none"]
    _dots(axes, names, rows)
    axes.set_xlabel(found["measure"])


def _dots(axes: Axes, names: list[str], rows: list[Json]) -> None:
    """Draw each row's mean as a dot on the line of its interval, the first on top."""
    places = list(range(len(rows)))[::-1]
    for place, row in zip(places, rows, strict=True):
        axes.plot([row["low"], row["high"]], [place, place], color=BLUE, lw=2, alpha=0.45)
        axes.plot(row["score"], place, "o", color=BLUE, markersize=6)
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=False, axis="y")


def _varied(axes: Axes, found: Json) -> None:
    """Draw every variant as a dot, its group's mean as a line."""
    groups = found["sensitivity"]
    for place, one in enumerate(reversed(groups.values())):
        scores = sorted(variant["score"] for variant in one["variants"])
        alike = [scores[:at].count(score) for at, score in enumerate(scores)]
        axes.plot([one["lowest"], one["highest"]], [place, place], color=MUTED, lw=1.2)
        axes.plot(scores, [place + 0.13 * n for n in alike], "o", color=BLUE, markersize=5)
        axes.plot([one["score"]] * 2, [place - 0.25, place + 0.25], color=ORANGE, lw=2.5)
    names = [name.replace(" of the ", "\nof the ") for name in groups]
    axes.set_yticks(range(len(groups)), names[::-1])
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{found['measure']}, each variant; the bar is their mean")


def _shots(axes: Axes, found: Json) -> None:
    rows = found["shots"]["counts"]
    places = list(range(len(rows)))
    is_one = len(found["shots"]["gain"]) == 1
    for way, (colour, label) in WAYS.items():
        if way in rows[0]:
            low, high, score = ([row[way][name] for row in rows] for name in ("low", "high", "score"))
            axes.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(places, score, "o-", color=colour, lw=2, markersize=5, label=None if is_one else label)
    axes.set_xticks(places, [str(row["shots"]) for row in rows])
    axes.set(xlabel="worked examples", ylabel=found["measure"])
    _legend(axes, is_one)


def _legend(axes: Axes, is_one: bool) -> None:
    if not is_one:
        axes.legend(loc="best")


def _reliability(axes: Axes, found: Json) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=DASHES[1], lw=1.3)
    of_prompt = found["calibration"]["prompted"]
    for way, (colour, label) in WAYS.items():
        curve = of_prompt[way]["curve"]
        total = sum(one["examples"] for one in curve)
        points = [[one[name] for one in curve] for name in ("confidence", "accuracy")]
        axes.plot(*points, color=colour, lw=1.6, label=label)
        axes.scatter(*points, s=[12 + 150 * one["examples"] / total for one in curve], color=colour)
    axes.set(
        xlabel="probability of the likeliest label", ylabel="share that is right", xlim=(0, 1.02), ylim=(-0.03, 1.05)
    )
    axes.legend(loc="best")


def _kl(axes: Axes, found: Json) -> None:
    rows = found["kl"]
    places = [row["position"] for row in rows]
    low, high, score = ([row[name] for row in rows] for name in ("low", "high", "score"))
    axes.vlines(places, low, high, color=BLUE, lw=2, alpha=0.45)
    axes.plot(places, score, "o-" if len(rows) > 1 else "o", color=BLUE, lw=1.4, markersize=5)
    axes.set_ylim(bottom=0)
    axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
    if len(places) > 8:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    else:
        axes.set_xticks(places)
    axes.set(xlabel="position of the answer's token", ylabel="nats")


def _seconds(axes: Axes, found: Json) -> None:
    cost = found["cost"]
    names = {"with the prompt": "with_prompt", "without it": "without"}
    for place, key in enumerate(reversed(names.values())):
        one = cost[key]
        axes.barh(place, one["prefill"], color=BLUE, height=0.5, label=None if place else "to the first token")
        rest = one["seconds"] - one["prefill"]
        axes.barh(place, rest, left=one["prefill"], color=ORANGE, height=0.5, label=None if place else "the rest")
    axes.set_yticks(range(len(names)), list(names)[::-1])
    axes.set_ylim(-0.6, 2.1)
    axes.set_xlim(0, 1.08 * max(cost[key]["seconds"] for key in names.values()))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds of a request")
    axes.legend(loc="upper right", ncols=2)


Draw = Callable[[Axes, Json], None]

PLOTS: dict[str, tuple[Callable[[Json], bool], Draw]] = {
    "Score of each prompt": (lambda found: True, _scores),
    "What should not matter, varied": (lambda found: bool(found["sensitivity"]), _varied),
    "Number of worked examples": (lambda found: len(found["shots"]["counts"]) > 1, _shots),
    "Is it as right as it is sure?": (lambda found: "calibration" in found, _reliability),
    "KL(prompted ‖ unprompted) by position": (lambda found: True, _kl),
    "A request": (lambda found: True, _seconds),
}
"""By title: whether an analysis has it, and how it is drawn."""
