"""Studies of one recipe run in several ways at equal data and steps: rows, a table and curves of each."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from benchmarks import harness
from kdjax.config import Config
from kdjax.metrics import METRICS, read
from kdjax.train import train

FIGURES = ("kl_before", "kl_after", "ce_after", "agreement_after", "perplexity_after")
FIGURES += ("own_share", "generation_seconds")
"""Of a run's summary, as far as it has them."""


class Study(NamedTuple):
    """A comparison.

    Attributes:
        name: of the module in benchmarks, of its results and of its picture.
        doc: the module's docstring, for --help.
        base: the config that all runs are made of; with True that of a trial, which may keep files in the directory.
        arms: name -> the config of a run, made of the base; it may begin in its run directory with files of its own.
        columns: head of a column of the table -> what of a row stands in it.
        curve: the figure of evaluations that is drawn, and what it is called.
        about: what is said below the table.
        more: further figures of a finished run.
    """

    name: str
    doc: str
    base: Callable[[Path, bool], Config]
    arms: dict[str, Callable[[Config, Path], Config]]
    columns: dict[str, Callable[[harness.Row], str]]
    curve: tuple[str, str]
    about: Callable[[harness.Row], str]
    more: Callable[[Config, Path], harness.Row] = lambda config, run: {}

    @property
    def results(self) -> Path:
        """Where its rows are kept."""
        return harness.RESULTS / f"{self.name}.jsonl"

    @property
    def picture(self) -> Path:
        """Where its curves are drawn."""
        return harness.ROOT / "docs" / f"{self.name}.svg"


def measure(study: Study, arm: str, home: Path, is_quick: bool) -> harness.Row:
    """Return the figures of a run."""
    run = home / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    base, began = study.base(home, is_quick), time.perf_counter()
    config = study.arms[arm](base, run)
    made = time.perf_counter() - began
    summary = train(config, run)
    rows = read(run / METRICS)
    seconds = [row["seconds"] for row in rows if "seconds" in row and row["step"] > 1]
    return {
        "what": study.name,
        "arm": arm,
        "steps": config.steps,
        "train_tokens": summary["train_tokens"],
        "made_seconds": made,
        "step_seconds": statistics.median(seconds),
        **{name: summary[name] for name in FIGURES if name in summary},
        "curve": [(row["step"], row[study.curve[0]]) for row in rows if study.curve[0] in row],
        **study.more(config, run),
    }


def markdown(study: Study, rows: Sequence[harness.Row]) -> str:
    """Return the table of a page of docs."""
    if not rows:
        return f"Not measured yet: `python -m benchmarks.{study.name}` writes the figures that stand here."
    lines = [f"| | {' | '.join(study.columns)} |", f"|:--|{'--:|' * len(study.columns)}"]
    for row in rows:
        lines.append(f"| {' | '.join([row['arm'], *(cell(row) for cell in study.columns.values())])} |")
    absent = [arm for arm in study.arms if arm not in {row["arm"] for row in rows}]
    short = f" Not measured yet: {'; '.join(absent)}." if absent else ""
    shown = f"![{study.curve[1]}, beside steps]({study.picture.name})"
    about = f"{study.about(rows[-1])}{short} {harness.measured_on(rows[-1]['environment'])}."
    return "\n".join([*lines, "", shown, "", about])


def curves(study: Study, rows: Sequence[harness.Row]) -> Figure:
    """Return a figure of each arm's evaluations beside steps."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for row, style in zip(rows, ("k-", "o--", "s-.", "^:", "D-", "v--", "x-."), strict=False):
        axes.plot(*zip(*row["curve"], strict=True), style, ms=4, lw=1.6, label=row["arm"], alpha=0.85)
    axes.set(xlabel="steps", ylabel=study.curve[1], yscale="log")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    return figure


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet."""
    parser = harness.parser(study.doc, study.results)
    parser.add_argument("--arms", nargs="+", default=list(study.arms), choices=list(study.arms), metavar="ARM")
    parser.add_argument("--home", type=Path, default=Path("runs") / study.name, metavar="DIR")
    parser.add_argument("--picture", type=Path, default=study.picture, metavar="PATH")
    options = parser.parse_args(arguments)
    environment, rows = harness.environment(), harness.kept(options)
    done = {row["arm"] for row in rows}
    with harness.home(options, options.home) as home:
        for arm in [arm for arm in options.arms if arm not in done]:
            rows.append(harness.tell(options, measure(study, arm, home, options.quick), environment))
            if not options.quick:
                with matplotlib.rc_context({"svg.hashsalt": "kdjax"}):
                    curves(study, rows).savefig(options.picture, metadata={"Date": None})
    return 0


def run(study: Study) -> None:
    """Run a study's module."""
    harness.leave(partial(main, study))
