"""One prompt from first to last by configs/prompt_pipeline.py: found, distilled, and what both are worth.

COMMAND: python -m benchmarks.pipeline          (about 18 minutes of a CPU core; run again to go on)

The pipeline's summary becomes the one row of benchmarks/results/pipeline.jsonl; `python -m benchmarks.readme` puts it
into docs/search.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import harness, quick
from kdjax import config as configs
from kdjax.console import STAGES, amount, recovered, scored
from kdjax.pipeline import PipelineConfig, pipeline

RESULTS = harness.RESULTS / "pipeline.jsonl"
RECIPE = harness.ROOT / "configs" / "prompt_pipeline.py"


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/search.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.pipeline` writes the figures that stand here."
    found = rows[-1]
    searched, best = found["search"], found["search"]["best"]
    lines = [f"| | {found['measure']} | gain over the model without a prompt |", "|:--|--:|--:|"]
    for key, name in STAGES.items():
        gain = scored(found["gains"][key]) if key in found["gains"] else ""
        lines.append(f"| {name} | {scored(found['test'][key])} | {gain} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Means and 95 % intervals (bootstrap) over {searched['examples']['test']} unseen examples, one run; the "
            f"commonest label alone scores {amount(searched['test']['commonest']['score'])}. The prompt, the best of "
            f'{searched["candidates"]}, is "{" ".join(best["text"].split())}" with {best["shots"]} worked examples.',
            "",
            *(f"- {said}" for said in recovered(found["distil"])),
            "",
            f"All stages: {found['seconds'] / 60:.0f} minutes. {harness.measured_on(found['environment'])}.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pipeline, or go on with it, and write the row in the place of the one there was."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--run", type=Path, default=Path("runs") / "prompt_pipeline", metavar="DIR")
    options = parser.parse_args(arguments)
    config, environment = configs.load(str(RECIPE), PipelineConfig), harness.environment()
    with harness.home(options, options.run.parent) as home:
        if options.quick:
            small = quick.prompts(config.search, home), quick.recipe(config.distil, home)
            config = replace(config, search=small[0], distil=small[1])
        found = pipeline(config, home / options.run.name) | {"environment": environment}
    if not options.quick:
        options.results.write_text(json.dumps({"what": "pipeline"} | found) + "\n", "utf-8")
    print(markdown([found]))
    return 0


if __name__ == "__main__":
    harness.leave(main)
