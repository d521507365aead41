"""What the recipes of prompt search find, one for each task: the winner, and what one would have had without a search.

COMMAND: python -m benchmarks.search          (6 to 20 minutes a recipe on a CPU core)

A recipe without a row in benchmarks/results/search.jsonl is run, those with one only where they are named; a search
that was stopped goes on. `python -m benchmarks.readme` puts the rows into docs/search.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness, quick
from kdjax import config as configs
from kdjax.console import PROMPTS, amount, scored
from kdjax.prompts.config import PromptsConfig
from kdjax.search import search

RESULTS = harness.RESULTS / "search.jsonl"
RECIPES = {
    "prompt_search": "classification",
    "prompt_question_answering": "question_answering",
    "prompt_summarising": "summarising",
    "prompt_generation": "generation",
}
"""Recipes in configs/ and the task of each, by which its row is known."""


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return of each recipe the table of its row, and what it was measured on."""
    of_task = {row["task"]: row for row in rows}
    return "\n\n".join(
        f"### {task.replace('_', ' ').capitalize()}: `configs/{recipe}.py`\n\n{_table(recipe, of_task.get(task))}"
        for recipe, task in RECIPES.items()
    )


def _table(recipe: str, found: harness.Row | None) -> str:
    if found is None:
        return f"Not measured yet: `python -m benchmarks.search {recipe}` writes the figures that stand here."
    lines = [f"| | {found['measure']} | the winner's gain over it |", "|:--|--:|--:|"]
    for key, name in PROMPTS.items():
        if key in found["test"]:
            gain = scored(found["gains"][key]) if key in found["gains"] else ""
            lines.append(f"| {name} | {scored(found['test'][key])} | {gain} |")
    best, spent, tokens, environment = (found[name] for name in ("best", "evaluations", "tokens", "environment"))
    corpus = "".join(f" {name} of its answers is {amount(value)}." for name, value in found["corpus"].items())
    text = " ".join(best["text"].split())
    lines += [
        "",
        f"Means and 95 % intervals (bootstrap) over {found['examples']['test']} unseen examples, one search. The "
        f'winner of {found["candidates"]} candidates is "{text}" with {best["shots"]} worked examples. It was '
        f"selected with {amount(found['selection']['score'])} over {found['selection']['examples']} examples: a gap of "
        f"{amount(found['gap'])}.{corpus}",
        "",
        f"The search took {spent['select']:,} evaluations of {tokens['select']:,} tokens, selecting examples alone "
        f"{spent['few_shot']:,} of {tokens['few_shot']:,}; {found['seconds']:.0f} s; "
        f"{harness.machine(environment)}; jax {environment['jax']}; commit {environment.get('commit', '?')}.",
    ]
    return "\n".join(lines)


def missing(rows: Sequence[harness.Row]) -> list[str]:
    """Return the recipes without a row."""
    measured = {row["task"] for row in rows}
    return [recipe for recipe, task in RECIPES.items() if task not in measured]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipes, or go on with them, and write the row of each in the place of the one it had."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)}; none: those without a row")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="holds the run directory of each recipe")
    options = parser.parse_args(arguments)
    if unknown := set(options.recipes) - set(RECIPES):
        parser.error(f"unknown recipe {min(unknown)!r}; known: {', '.join(RECIPES)}")
    environment = harness.environment()
    with harness.home(options, options.runs) as home:
        for recipe in options.recipes or missing(harness.kept(options)):
            config = configs.load(str(harness.ROOT / "configs" / f"{recipe}.py"), PromptsConfig)
            config = quick.prompts(config, home) if options.quick else config
            found = {"what": "search"} | search(config, home / recipe) | {"environment": environment}
            if not options.quick:
                rows = [row for row in harness.read(options.results) if row["task"] != config.task]
                options.results.write_text("".join(json.dumps(row) + "\n" for row in [*rows, found]), "utf-8")
            print(markdown([found]))
    return 0


if __name__ == "__main__":
    harness.leave(main)
