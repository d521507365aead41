"""How much of a prompt soft prompts recover, by kind, start and number of tokens: configs/soft_prompt.py, many times.

COMMAND: python -m benchmarks.soft_prompts          (about 90 minutes on 2 CPU cores; run again to go on)
         python -m benchmarks.soft_prompts --cases prompt-prompt-16 prefix-prompt-16          (a part of it)

The teacher's answers are sampled once and shared. Rows go to benchmarks/results/soft_prompts.jsonl.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness, quick
from kdjax import config as configs
from kdjax.answers import ANSWERS, PROGRESS, write_answers
from kdjax.config import Config
from kdjax.console import count, percent, small
from kdjax.models.config import SoftPrompt
from kdjax.train import train

RESULTS = harness.RESULTS / "soft_prompts.jsonl"
RECIPE = harness.ROOT / "configs" / "soft_prompt.py"

KINDS, STARTS, TOKENS = ("prompt", "prefix"), ("prompt", "vocabulary", "random"), (16, 64)
CASES: dict[str, tuple[Any, Any, int]] = {
    f"{kind}-{start}-{tokens}": (kind, start, tokens)
    for tokens, start, kind in itertools.product(TOKENS, STARTS, KINDS)
}
"""Name of a case -> kind, start and number of tokens."""

RATES = {"prompt": 1e-2, "prefix": 1e-2}
"""The highest learning rate of each kind."""

FIGURES = (
    "kl_before",
    "kl_after",
    "recovered",
    "recovered_interval",
    "recovered_prompts",
    "recovered_own",
    "behaviour",
)
FIGURES += ("parameters_trained", "steps", "seconds", "held_out_sha256")
"""What of summary.json a row has."""


def case(config: Config, name: str) -> Config:
    """Return the recipe of a case."""
    kind, start, tokens = CASES[name]
    text = config.student.soft_prompt.text if start == "prompt" else ""
    soft = SoftPrompt(tokens, kind, start, text)
    optim = replace(config.optim, learning_rate=RATES[kind])
    return replace(config, student=replace(config.student, soft_prompt=soft), optim=optim)


def measure(config: Config, name: str, runs: Path) -> harness.Row:
    """Return the figures of a case, trained in `runs` on answers that all cases share."""
    shared, own = runs / "answers", runs / name
    for path in (shared, own):
        path.mkdir(parents=True, exist_ok=True)
    write_answers(config, shared)
    for file in (ANSWERS, PROGRESS):
        shutil.copyfile(shared / file, own / file)
    kind, start, tokens = CASES[name]
    summary = train(case(config, name), own)
    return {"case": name, "kind": kind, "start": start, "tokens": tokens} | {key: summary[key] for key in FIGURES}


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/prompts.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.soft_prompts` writes the figures that stand here."
    lines = [
        "| kind | start | tokens | trained | KL at the start | KL after | recovered | on its own answers | behaviour |"
    ]
    lines += ["|:--|:--|--:|--:|--:|--:|--:|--:|--:|"]
    for row in sorted(rows, key=lambda row: list(CASES).index(row["case"])):
        low, high = (percent(end) for end in row["recovered_interval"])
        cells = [row["kind"], row["start"], str(row["tokens"]), count(row["parameters_trained"])]
        cells += [small(row["kl_before"]), small(row["kl_after"]), f"{percent(row['recovered'])} ({low} to {high})"]
        lines.append(
            f"| {' | '.join([*cells, percent(row['recovered_own']), percent(row['behaviour']['distilled'])])} |"
        )
    last, said = rows[-1], rows[-1]["behaviour"]
    return "\n".join(
        [
            *lines,
            "",
            f"KL in nats a token, recovered with its 95 % interval over {last['recovered_prompts']} unseen prompts; "
            f"{last['steps']} steps each. What the prompt asks for is in {percent(said['prompted'])} of the "
            f"prompted teacher's answers and {percent(said['unprompted'])} of the unprompted one's. "
            f"{harness.measured_on(last['environment'])}; held-out text SHA-256 `{last['held_out_sha256'][:16]}`.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cases that are not measured yet."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--runs", type=Path, default=Path("runs") / "soft_prompts", metavar="DIR")
    options = parser.parse_args(arguments)
    config, environment = configs.load(str(RECIPE)), harness.environment()
    done = {row["case"] for row in harness.kept(options)}
    with harness.home(options, options.runs) as home:
        config = quick.recipe(config, home) if options.quick else config
        for name in [name for name in options.cases if name not in done]:
            harness.tell(options, measure(config, name, home), environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
