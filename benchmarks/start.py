"""How long a run takes to its first step: with nothing compiled before, and with what the run before compiled.

COMMAND: python -m benchmarks.start                             (5 minutes on 2 CPU cores)
         python -m benchmarks.start configs/quickstart.py       (of another recipe)

Each run is a process of its own, in a directory of its own. Cold and warm take turns; each pair begins with an empty
cache of compiled programs. The time is the run's own, from its beginning to the row of its first step, models, data and
the evaluation before it included; importing takes the same time in both and is not in it. Rows go to
benchmarks/results/start.jsonl; `python -m benchmarks.readme` puts them into benchmarks/README.md.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from kdjax.console import percent

RESULTS = harness.RESULTS / "start.jsonl"
FLAGS = ("--steps", "1", "--optim.warmup-steps", "0", "--prompt", "")
LIMIT = 1800
"""Seconds of one run, at most."""
STATES = ("cold", "warm")


def first_step(recipe: str, compiled: Path) -> harness.Row:
    """Return what a run says of its first step, programs being kept in a directory.

    Raises:
        SystemExit: the run failed.
    """
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "kdjax", "train", recipe, "--run-dir", f"{home}/run", *FLAGS]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
        done = subprocess.run(
            command, cwd=harness.ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")
        rows = harness.read(Path(home) / "run" / "metrics.jsonl")
    (row,) = (row for row in rows if "first_step_seconds" in row)
    return {name: row[name] for name in ("first_step_seconds", "compiled_seconds", "compiled_programs")}


def measure(recipe: str, rounds: int) -> harness.Row:
    """Return medians and ranges of both states, and the ratio pair by pair."""
    found: dict[str, list[harness.Row]] = {state: [] for state in STATES}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as compiled:
            for state in STATES:
                found[state].append(first_step(recipe, Path(compiled)))
                print(f"{state}: {found[state][-1]['first_step_seconds']:.1f} s", file=sys.stderr, flush=True)
    times = {state: [one["first_step_seconds"] for one in rows] for state, rows in found.items()}
    row: harness.Row = {"recipe": Path(recipe).stem, "rounds": rounds}
    for state, rows in found.items():
        row[state] = statistics.median(times[state])
        row[f"{state}_range"] = (min(times[state]), max(times[state]))
        row[f"{state}_compiled_seconds"] = statistics.median(one["compiled_seconds"] for one in rows)
    return row | {"ratio": statistics.median(warm / cold for cold, warm in zip(*times.values(), strict=True))}


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of benchmarks/README.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.start` writes the figures that stand here."
    lines = [
        "| recipe | cold (range) | of it compiling | warm (range) | warm of cold | on |",
        "|:--|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        cold, warm = (f"{row[s]:.1f} s ({row[f'{s}_range'][0]:.1f} to {row[f'{s}_range'][1]:.1f})" for s in STATES)
        of_it, here = f"{row['cold_compiled_seconds']:.1f} s", harness.measured_on(row["environment"])
        lines.append(f"| {row['recipe']} | {cold} | {of_it} | {warm} | {percent(row['ratio'])} | {here} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a recipe."""
    parser = harness.parser(__doc__, RESULTS, "one round; nothing is kept")
    parser.add_argument("recipe", nargs="?", default="configs/smoke.py")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    environment = harness.environment()
    row = measure(options.recipe, 1 if options.quick else options.rounds)
    print(markdown([harness.tell(options, row, environment)]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    harness.leave(main)
