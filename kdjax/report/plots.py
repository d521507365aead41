"""The curves of one or several runs as SVG that stands in a page: its text and colours are the page's own.

Each row of `PLOTS` is read in two ways: one run shows all its parts, several runs show their first part each.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from kdjax.console import amount, finite, percent

Rows = Sequence[Mapping[str, Any]]
Summary = Mapping[str, Any]
Runs = Mapping[str, tuple[Rows, Summary]]
"""Label -> rows of metrics and summary."""

MOST_POINTS = 600
"""Of a curve; longer ones are thinned."""
COLOURS = 7
"""Hues of the page's style sheet; later curves repeat them with other dashes."""
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

INK, MUTED, GRID, CARD = "#000001", "#000002", "#000003", "#000004"
# Each stands for a variable of the style sheet, which has a light and a dark value.
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", CARD: "--card"}
VARIABLES |= {f"#0000{16 + i:02x}": f"--curve-{i}" for i in range(COLOURS)}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.4,
    "lines.solid_capstyle": "round",
}


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    unit: str
    parts: Mapping[str, str]
    """Names in a row of metrics, and what the legend calls them; the first is the main one."""
    factor: float = 1.0
    marks: str = ""
    """The summary's figure whose `_before` and `_after` are the ends of the curve, and `_teacher` a line."""
    may_be_log: bool = False
    """The scale is logarithmic where values span a factor of 20."""
    is_noisy: bool = False
    """A bold smoothed line lies over the figures of each step."""


LOSSES = {"loss": "loss", "ce": "cross entropy", "kd": "divergence"}
AGREEMENTS = {"eval_agreement": "held out", "agreement": "training"}
PLOTS = (
    (Panel("Training loss", "nats per token", LOSSES, may_be_log=True, is_noisy=True),),
    (Panel("Held-out KL to the teacher", "nats per token", {"eval_kl": "held out"}, marks="kl", may_be_log=True),),
    (Panel("Same top token as the teacher", "% of tokens", AGREEMENTS, factor=100, marks="agreement", is_noisy=True),),
    (Panel("Held-out perplexity", "perplexity", {"eval_perplexity": "student"}, marks="perplexity", may_be_log=True),),
    (
        Panel("Gradient norm", "norm", {"grad_norm": "gradient norm"}, may_be_log=True, is_noisy=True),
        Panel("Learning rate", "rate", {"learning_rate": "learning rate"}),
    ),
    (Panel("Training speed", "tokens/s", {"tokens_per_second": "tokens/s"}, is_noisy=True),),
)
"""Each becomes one picture; panels of one picture stand above each other."""


@dataclass(frozen=True)
class Curve:
    """What is drawn as one line."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    hue: int
    is_held_out: bool


def plots(runs: Runs) -> list[Markup]:
    """Return an inline SVG for each row of `PLOTS` of which the runs know anything."""
    drawn = []
    for number, panels in enumerate(PLOTS):
        found = [(panel, curves) for panel in panels if (curves := _curves(panel, runs))]
        if found:
            drawn.append(_picture(found, runs, f"plot{number}-"))
    return drawn


def swatch(number: int) -> Markup:
    """Return a short piece of the curve of that number, for a legend outside the plots."""
    dash = {"-": "", DASHES[1]: "10 4", DASHES[2]: "3 3"}[DASHES[number // COLOURS % len(DASHES)]]
    stroke = f'stroke="var(--curve-{number % COLOURS})" stroke-width="3" stroke-dasharray="{dash}"'
    return Markup(f'<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true"><path d="M1 5H29" {stroke}/></svg>')


def _curves(panel: Panel, runs: Runs) -> list[Curve]:
    """Return a curve for each part that the one run has, or each run's curve of the first part."""
    if len(runs) > 1:
        first = next(iter(panel.parts))
        found = [_curve(panel, first, label, i, *run) for i, (label, run) in enumerate(runs.items())]
    else:
        ((rows, summary),) = runs.values()
        # Without a divergence the loss is the cross entropy.
        names = [name for name in panel.parts if name != "ce" or any("kd" in row for row in rows)]
        found = [_curve(panel, name, panel.parts[name], i, rows, summary) for i, name in enumerate(names)]
    return [curve for curve in found if curve]


def _curve(panel: Panel, name: str, label: str, hue: int, rows: Rows, summary: Summary) -> Curve | None:
    steps, values = series(rows, name)
    is_held_out = name.startswith("eval_")
    if is_held_out:
        last = finite(summary.get("steps")) or max((row["step"] for row in rows), default=0)
        for step, when in ((0.0, "before"), (float(last), "after")):
            value = finite(summary.get(f"{panel.marks}_{when}"))
            if value is not None and step not in steps:
                steps, values = np.append(steps, step), np.append(values, value)
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
    return Curve(label, steps, values * panel.factor, hue, is_held_out) if np.isfinite(values).any() else None


def _of_teacher(panel: Panel, runs: Runs) -> float | None:
    """Return the teacher's own figure where all runs agree on it."""
    figures = {finite(summary.get(f"{panel.marks}_teacher")) for _, summary in runs.values()} if panel.marks else {None}
    return figures.pop() if len(figures) == 1 else None


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of the rows that have `name`, and its values; what is no number becomes NaN."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    values = [np.nan if finite(value) is None else value for _, value in pairs]
    return np.array([step for step, _ in pairs], float), np.array(values, float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean over a twentieth of the curve, at least five points, around each point; NaNs are passed over."""
    half = max(2, len(values) // 40)
    known = np.isfinite(values)
    totals, counts = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(known, values, 0.0), known))
    centre = np.arange(len(values))
    first, last = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    number = counts[last] - counts[first]
    return np.where(number > 0, (totals[last] - totals[first]) / np.maximum(number, 1), np.nan)


def thin(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points: of each stretch its smallest and its largest value, so that spikes remain."""
    if len(steps) <= most:
        return steps, values
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(steps)), most // 2):
        inside = values[stretch]
        ends = {0} if np.isnan(inside).all() else {int(np.nanargmin(inside)), int(np.nanargmax(inside))}
        kept += sorted(int(stretch[end]) for end in ends)
    return steps[kept], values[kept]


def drawn(title: str, draw: Callable[[Axes], None], prefix: str) -> Markup:
    """Return an inline SVG of one pair of axes, filled by `draw`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        draw(axes)
        return _svg(figure, title, prefix)


def _picture(found: Sequence[tuple[Panel, list[Curve]]], runs: Runs, prefix: str) -> Markup:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        column = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
        for axes, (panel, curves) in zip(column, found, strict=True):
            _fill(axes, panel, curves, _of_teacher(panel, runs), is_one_run=len(runs) == 1)
        figure.axes[-1].set_xlabel("step")
        return _svg(figure, ", ".join(panel.title for panel, _ in found), prefix)


def _svg(figure: Figure, title: str, prefix: str) -> Markup:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), title, prefix)


def _fill(axes: Axes, panel: Panel, curves: list[Curve], teacher: float | None, is_one_run: bool) -> None:
    axes.set(title=panel.title, ylabel=panel.unit)
    for curve in curves:
        _draw(axes, curve, panel.is_noisy and not curve.is_held_out, curve.label if is_one_run else None)
    if teacher is not None:
        axes.axhline(teacher * panel.factor, color=MUTED, linestyle=DASHES[1], lw=1.3, label="teacher")
    _scale(axes, curves, panel.may_be_log)
    if is_one_run and panel.marks:
        _name_ends(axes, curves[0], percent if panel.factor == 100 else amount, panel.factor)
    if teacher is not None or (is_one_run and len(curves) > 1):
        axes.legend(loc="best")


def _draw(axes: Axes, curve: Curve, is_noisy: bool, label: str | None) -> None:
    """Draw held-out figures as dots on a line; of noisy ones the values thin, and bold their smoothed course."""
    colour = f"#0000{16 + curve.hue % COLOURS:02x}"
    dash = DASHES[curve.hue // COLOURS % len(DASHES)]
    marker = {"marker": "o", "markersize": 4.5} if curve.is_held_out else {}
    if is_noisy:
        alpha = 0.6 if len(curve.steps) <= MOST_POINTS else 0.25
        axes.plot(*thin(curve.steps, curve.values), color=colour, lw=0.8, alpha=alpha, zorder=1.8)
    course = smooth(curve.values) if is_noisy else curve.values
    top = 2.4 if curve.is_held_out else 2.2
    axes.plot(*thin(curve.steps, course), color=colour, linestyle=dash, lw=2, label=label, zorder=top, **marker)


def _scale(axes: Axes, curves: list[Curve], may_be_log: bool) -> None:
    values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
    if may_be_log and 0 < 20 * values.min() <= values.max():
        axes.set_yscale("log")
        subs = (1.0,) if values.max() > 500 * values.min() else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=10))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0, values.min()))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: short(value))


def short(value: float) -> str:
    """Return a number as a tick of an axis shows it: ``0.0002``, ``1,500``, ``20 k``, ``3 M``."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,g} M"
    return f"{value / 1e3:g} k" if abs(value) >= 1e4 else f"{value:,g}"


def _name_ends(axes: Axes, curve: Curve, show: Callable[[float], str], factor: float) -> None:
    """Write the values before and after beside the ends of the curve."""
    axes.set_ylim(top=axes.transData.inverted().transform(axes.transAxes.transform((0, 1.08)))[1])
    known = np.flatnonzero(np.isfinite(curve.values))
    places = ({"xytext": (7, 2), "ha": "left"}, {"xytext": (0, 8), "ha": "right"})
    for end, place in zip(sorted({known[0], known[-1]}), places, strict=False):
        text, at = show(float(curve.values[end]) / factor), (curve.steps[end], curve.values[end])
        box = {"facecolor": CARD, "edgecolor": "none", "alpha": 0.75, "pad": 1}
        axes.annotate(text, at, textcoords="offset points", fontweight="bold", bbox=box, zorder=3, **place)


def _inline(svg: str, title: str, prefix: str) -> Markup:
    """Return the SVG as part of a page: as wide as its place, ids of its own, and the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"(font-family: |font: [^'\";]*?px )[^;\"]*", r"\1inherit", svg)
    return Markup(re.sub("|".join(VARIABLES), lambda colour: f"var({VARIABLES[colour[0]]})", svg))
