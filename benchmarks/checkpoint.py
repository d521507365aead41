"""What saving costs a run: how long the loop stands still for it, what is written, and how long it takes to come back.

COMMAND: python -m benchmarks.checkpoint          (6 minutes on 2 CPU cores)

The step is that of benchmarks.step, and any field of its config is a flag. Stretches of steps with a save in their
midst and without one take turns, and the difference of a pair, in steps of its own, is what the save cost the loop:
copying the state, and what writing it in the background took from the steps beside it. The next stretch begins once
what was saved is on disk. Rows go to benchmarks/results/checkpoint.jsonl; `python -m benchmarks.readme` puts them into
benchmarks/README.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import harness
from benchmarks.step import QUICK, Training, shape, sizes, training
from kdjax import config as configs
from kdjax.checkpoint import CheckpointConfig, Checkpoints
from kdjax.errors import UserError

RESULTS = harness.RESULTS / "checkpoint.jsonl"
LEAST = 4
"""Steps of a stretch, at the least."""


def stretch(made: Training, steps: int, save: Any) -> list[float]:
    """Return the seconds of each step of a stretch, in whose midst `save` is called."""
    seconds = []
    for number in range(steps):
        began = time.perf_counter()
        made.step()
        if number == steps // 2:
            save()
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(made: Training, rounds: int, steps: int, directory: Path) -> harness.Row:
    """Return what a save costs, in steps and in seconds, how much it writes and how long reading it takes."""
    pairs: list[tuple[list[float], list[float]]] = []
    called, written = [], []
    with Checkpoints(directory, CheckpointConfig(keep=1, keep_best=False)) as checkpoints:

        def save() -> None:
            began = time.perf_counter()
            checkpoints.save(len(pairs) + 1, made.state, {}, "{}")
            called.append(time.perf_counter() - began)

        for number in range(rounds):
            plain = stretch(made, steps, lambda: None)
            began = time.perf_counter()
            saving = stretch(made, steps, save)
            checkpoints.wait()
            written.append(time.perf_counter() - began - sum(saving[: steps // 2]))
            pairs.append((plain, saving))
            said = f"round {number + 1}: the loop stood still for {called[-1]:.2f} s, steps of"
            print(f"{said} {statistics.median(plain):.2f} s", file=sys.stderr, flush=True)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    began = time.perf_counter()
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        restored = checkpoints.restore(made.job.abstract_state)
        jax.block_until_ready(restored.state if restored else None)
    restore = time.perf_counter() - began
    stalls = [one / statistics.median(plain) for one, (plain, _) in zip(called, pairs, strict=True)]
    costs = [(sum(saving) - sum(plain)) / statistics.median(plain) for plain, saving in pairs]
    return {
        "step_seconds": statistics.median(statistics.median(plain) for plain, _ in pairs),
        "stall_seconds": statistics.median(called),
        "stall_steps": statistics.median(stalls),
        "cost_steps": statistics.median(costs),
        "cost_steps_range": (min(costs), max(costs)),
        "written_seconds": statistics.median(written),
        "restore_seconds": restore,
        "bytes": size,
        "rounds": rounds,
        "steps": steps,
        "student": sizes(made.job.student.model.config),
    }


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of benchmarks/README.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.checkpoint` writes the figures that stand here."
    names = "student", "written", "step", "the loop stands still", "a save costs, in steps (range)", "on disk after"
    lines = [f"| {' | '.join((*names, 'restored in', 'on'))} |", "|:--|--:|--:|--:|--:|--:|--:|:--|"]
    for row in rows:
        low, high = row["cost_steps_range"]
        cells = (
            row["student"],
            f"{row['bytes'] / 1e6:,.0f} MB",
            f"{row['step_seconds']:.2f} s",
            f"{row['stall_seconds']:.2f} s, {row['stall_steps']:.2f} steps",
            f"{row['cost_steps']:.2f} ({low:.2f} to {high:.2f})",
            f"{row['written_seconds']:.1f} s",
            f"{row['restore_seconds']:.1f} s",
            harness.measured_on(row["environment"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the flags ask for; return the exit code."""
    parser = harness.parser(__doc__, RESULTS, "small rows, 1 round; nothing is kept")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of stretches")
    parser.add_argument("--stretch", type=int, default=8, help="steps of a stretch")
    parser.add_argument("--directory", type=Path, help="on the disk that is measured; default: that of temporary files")
    options, flags = parser.parse_known_args(arguments)
    if options.rounds < 1 or options.stretch < LEAST:
        raise UserError(f"--rounds is {options.rounds}, --stretch {options.stretch}; wanted 1, {LEAST} or more")
    config = configs.override(shape(), [*(QUICK if options.quick else ()), *flags], "benchmarks.checkpoint")
    environment = harness.environment()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rounds = 1 if options.quick else options.rounds
        row = measure(training(config, 1), rounds, options.stretch, Path(directory) / "checkpoints")
    row |= {"environment": environment}
    if not options.quick:
        harness.append(options.results, [row])
    print(markdown([row]), file=sys.stderr)
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    harness.leave(main)
