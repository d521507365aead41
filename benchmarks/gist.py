"""What a trained gist recovers of prompts never seen, and what it saves: configs/gist.py, run once.

COMMAND: python -m benchmarks.gist          (about 8 minutes on 1 CPU core)

The row goes to benchmarks/results/gist.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import harness, quick
from kdjax import config as configs
from kdjax.config import Config
from kdjax.console import count, percent, small
from kdjax.train import train

RESULTS = harness.RESULTS / "gist.jsonl"
RECIPE = harness.ROOT / "configs" / "gist.py"

SHARES = ("recovered", "recovered_swapped", "recovered_by_gist", "recovered_own", "recovered_own_by_gist")
FIGURES = ("kl_before", "kl_after", *SHARES, *(f"{name}_interval" for name in SHARES), "recovered_prompts", "saved")
FIGURES += ("parameters_trained", "train_documents", "steps", "seconds", "held_out_sha256")
"""What of summary.json a row has."""


def measure(config: Config, directory: Path) -> harness.Row:
    """Return the figures of the recipe, trained in an empty directory."""
    summary = train(config, directory)
    return {"places": config.student.gist} | {key: summary[key] for key in FIGURES}


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/prompts.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.gist` writes the figures that stand here."
    heads = ["places", "steps", "KL before → after", "recovered", "behind another's gist", "the gist's own share"]
    heads += ["on its own answers", "the gist's own share of that"]
    lines = [f"| {' | '.join(heads)} |", f"|{'--:|' * len(heads)}"]
    for row in rows:
        shares = [_share(row, name) for name in SHARES]
        cells = [str(row["places"]), count(row["steps"]), f"{small(row['kl_before'])} → {small(row['kl_after'])}"]
        lines.append(f"| {' | '.join([*cells, *shares])} |")
    last, saved = rows[-1], rows[-1]["saved"]
    return "\n".join(
        [
            *lines,
            "",
            f"KL in nats a token, shares with their 95 % interval over {last['recovered_prompts']} prompts of modules "
            f"never trained on; {count(last['train_documents'])} training passages. A request is "
            f"{count(saved['prompt_tokens'])} tokens shorter, its cache {saved['cache_bytes'] / 1e6:.1f} MB smaller. "
            f"{count(last['seconds'])} seconds. {harness.measured_on(last['environment'])}; held-out "
            f"text SHA-256 `{last['held_out_sha256'][:16]}`.",
        ]
    )


def _share(row: harness.Row, name: str) -> str:
    """Return a share with its interval; a dash in rows that were measured before it was."""
    return f"{percent(row[name])} ({' to '.join(map(percent, row[f'{name}_interval']))})" if name in row else "–"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the recipe, and add a row."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="0: the recipe's")
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / "gist_benchmark", metavar="DIR")
    options = parser.parse_args(arguments)
    config, environment = configs.load(str(RECIPE)), harness.environment()
    config = replace(config, steps=options.steps or config.steps)
    with harness.home(options, options.run_dir) as home:
        config = quick.recipe(config, home) if options.quick else config
        harness.tell(options, measure(config, home / "run" if options.quick else home), environment)
    return 0


if __name__ == "__main__":
    harness.leave(main)
