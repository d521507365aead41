"""One student taught by a live teacher and from a cache of each kind: held-out KL beside steps, and seconds.

COMMAND: python -m benchmarks.teachers                 (about 30 minutes on 2 CPU cores; run again to go on)

The recipe is configs/quickstart.py: the same student, rows and steps for all, and held-out text measured against the
whole teacher. Labelling is counted apart, since it is done once for any number of students. Rows, each with its curve,
go to benchmarks/results/teachers.jsonl, of which docs/teachers.svg is drawn; `python -m benchmarks.readme` makes the
table of docs/teachers.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks import harness
from kdjax import config as configs
from kdjax.console import amount, percent
from kdjax.label import label
from kdjax.metrics import METRICS, read
from kdjax.teacher import LabelConfig
from kdjax.train import train

RESULTS = harness.RESULTS / "teachers.jsonl"
PICTURE = harness.ROOT / "docs" / "teachers.svg"
RECIPE = harness.ROOT / "configs" / "quickstart.py"

TEACHERS: dict[str, LabelConfig | None] = {
    "live": None,
    "hidden state, bfloat16": LabelConfig("hidden"),
    "top-64, 16 bits": LabelConfig("topk", bits=16),
    "12 draws, 8 bits": LabelConfig("sampled", bits=8),
}
"""Name -> what is kept; None is run at every step."""


def measure(name: str, home: Path, recipe: str, flags: Sequence[str], looks: int) -> harness.Row:
    """Return the figures of a run."""
    config = configs.override(configs.load(recipe), list(flags), "benchmarks.teachers")
    config = replace(config, prompt="", eval_every=max(1, config.steps // looks))
    kept, manifest, labelled = TEACHERS[name], {}, 0.0
    for directory in (home / "run", home / "cache"):
        shutil.rmtree(directory, ignore_errors=True)
    if kept is not None:
        began, config = time.perf_counter(), replace(config, label=kept)
        manifest = label(config, home / "cache")
        labelled = time.perf_counter() - began
        config = replace(config, cache=str(home / "cache"))
    summary = train(config, home / "run")
    rows = read(home / "run" / METRICS)
    return {
        "teacher": name,
        "steps": config.steps,
        "train_tokens": summary["train_tokens"],
        "label_seconds": labelled,
        "step_seconds": statistics.median(row["seconds"] for row in rows if "seconds" in row and row["step"] > 1),
        "bytes_per_token": manifest.get("bytes_per_token"),
        "kl_before": summary["kl_before"],
        "kl_after": summary["kl_after"],
        "agreement_after": summary["agreement_after"],
        "perplexity_after": summary["perplexity_after"],
        "curve": [(row["step"], row["eval_kl"]) for row in rows if "eval_kl" in row],
    }


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/teachers.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.teachers` writes the figures that stand here."
    heads = ["teacher", "bytes a token on disk", "a step", "labelling, once", "held-out KL before → after"]
    heads += ["agreement", "perplexity"]
    lines = [f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
    for row in rows:
        cells = [
            row["teacher"],
            "–" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:,.1f}",
            f"{row['step_seconds']:.2f} s",
            "–" if row["bytes_per_token"] is None else f"{row['label_seconds']:,.0f} s",
            f"{amount(row['kl_before'])} → {row['kl_after']:.3f}",
            percent(row["agreement_after"]),
            f"{row['perplexity_after']:,.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    last = rows[-1]
    return "\n".join(
        [
            *lines,
            "",
            "![Held-out KL beside steps, by teacher](teachers.svg)",
            "",
            f"{last['steps']} steps, {last['train_tokens']:,} tokens of `configs/quickstart.py`, one run each; KL in "
            f"nats a token. {harness.measured_on(last['environment'])}.",
        ]
    )


def picture(rows: Sequence[harness.Row]) -> Figure:
    """Return held-out KL beside steps, a line a teacher."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for row, style in zip(rows, ("k-", "o--", "s-", "^-"), strict=False):
        axes.plot(*zip(*row["curve"], strict=True), style, ms=4, lw=1.6, label=row["teacher"], alpha=0.85)
    axes.set(xlabel="steps", ylabel="held-out KL to the teacher, nats a token", yscale="log")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), metavar="TEACHER")
    parser.add_argument("--recipe", default=str(RECIPE), metavar="CONFIG")
    parser.add_argument("--looks", type=int, default=8, help="evaluations on the way")
    parser.add_argument("--home", type=Path, default=Path("runs") / "teachers", metavar="DIR")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="of configs/smoke.py, in 4 steps; nothing is kept")
    options, flags = parser.parse_known_args(arguments)
    environment, recipe = harness.environment(), options.recipe
    if options.quick:
        recipe, flags = (
            str(harness.ROOT / "configs" / "smoke.py"),
            ["--steps", "4", "--objective.temperature", "1", *flags],
        )
    done = set() if options.quick else {row["teacher"] for row in harness.read(options.results)}
    for name in [name for name in options.teachers if name not in done]:
        row = {"what": "teachers"} | measure(name, options.home, recipe, flags, options.looks)
        if not options.quick:
            harness.append(options.results, [row | {"environment": environment}])
        print(json.dumps({key: value for key, value in row.items() if key != "curve"}), flush=True)
    if not options.quick:
        with matplotlib.rc_context({"svg.hashsalt": "kdjax"}):
            picture(harness.read(options.results)).savefig(options.picture, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
