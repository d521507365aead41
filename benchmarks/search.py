"""What the recipe of prompt search finds: the winner, and what one would have had without a search.

COMMAND: python -m benchmarks.search          (about 5 minutes on 2 CPU cores)

The row is written to benchmarks/results/search.jsonl, anew each time; `python -m benchmarks.readme` puts it into
docs/search.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from kdjax import config as configs
from kdjax.console import PROMPTS, amount
from kdjax.prompts.config import PromptsConfig
from kdjax.search import search

RESULTS = harness.RESULTS / "search.jsonl"
RECIPE = harness.ROOT / "configs" / "prompt_search.py"


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of the last row, and what it was measured on."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.search` writes the figures that stand here."
    found = rows[-1]
    lines = [f"| | {found['measure']} | the winner's gain over it |", "|:--|--:|--:|"]
    for key, name in PROMPTS.items():
        if key in found["test"]:
            gain = _interval(found["gains"][key]) if key in found["gains"] else ""
            lines.append(f"| {name} | {_interval(found['test'][key])} | {gain} |")
    best, spent, tokens, environment = (found[name] for name in ("best", "evaluations", "tokens", "environment"))
    lines += [
        "",
        f"Means and 95 % intervals (bootstrap) over {found['examples']['test']} unseen examples, one search. The "
        f'winner of {found["candidates"]} candidates is "{best["text"]}" with {best["shots"]} worked examples. It was '
        f"selected with {amount(found['selection']['score'])} over {found['selection']['examples']} examples: a gap of "
        f"{amount(found['gap'])}.",
        "",
        f"The search took {spent['select']:,} evaluations of {tokens['select']:,} tokens, selecting examples alone "
        f"{spent['few_shot']:,} of {tokens['few_shot']:,}; {environment['device']}, "
        f"{environment['cpu_cores']} CPU core(s); jax {environment['jax']}; commit {environment.get('commit', '?')}.",
    ]
    return "\n".join(lines)


def _interval(found: dict[str, float]) -> str:
    return f"{amount(found['score'])} ({amount(found['low'])} to {amount(found['high'])})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe, or go on with it, and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/prompt_search"))
    options = parser.parse_args(arguments)
    found = search(configs.load(str(RECIPE), PromptsConfig), options.run_dir)
    RESULTS.write_text(json.dumps({"what": "search"} | found) + "\n", "utf-8")
    print(markdown([found]))


if __name__ == "__main__":
    main()
