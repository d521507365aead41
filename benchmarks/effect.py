"""What prompts do to a task by configs/effect.py: scores, sensitivity, likelihood, calibration and cost of a request.

COMMAND: python -m benchmarks.effect          (about 6 minutes of a CPU core; run again to go on)

The analysis becomes the one row of benchmarks/results/effect.jsonl; `python -m benchmarks.readme` puts what a person
reads of it into docs/effect.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import harness, quick
from kdjax import config as configs
from kdjax.effect import effect
from kdjax.prompts.config import EffectConfig
from kdjax.report.effect import sentences, tables

RESULTS = harness.RESULTS / "effect.jsonl"
RECIPE = harness.ROOT / "configs" / "effect.py"


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the tables and sentences of docs/effect.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.effect` writes the figures that stand here."
    found, lines = rows[-1], list[str]()
    for title, (heads, cells) in tables(found).items():
        lines += [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells] + [""]
    return "\n".join(
        [*lines, *(f"- {said}" for said in sentences(found)), "", harness.measured_on(found["environment"])]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse, or go on with it, and write the row in the place of the one there was."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--run", type=Path, default=Path("runs") / "effect", metavar="DIR")
    options = parser.parse_args(arguments)
    config, environment = configs.load(str(RECIPE), EffectConfig), harness.environment()
    with harness.home(options, options.run.parent) as home:
        if options.quick:
            config = replace(config, prompts=quick.prompts(config.prompts, home), orders=1, draws=1, most_shots=1)
        found = effect(config, home / options.run.name) | {"environment": environment}
    if not options.quick:
        options.results.write_text(json.dumps({"what": "effect"} | found) + "\n", "utf-8")
    print(markdown([found]))
    return 0


if __name__ == "__main__":
    harness.leave(main)
