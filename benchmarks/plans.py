"""Plans of large recipes, compiled for machines that are not here: memory and collectives, chunked loss beside plain.

COMMAND: python -m benchmarks.plans       (up to an hour on 2 CPU cores; needs pip install -e ".[plan-tpu,plan-gpu]")

Rows are appended to benchmarks/results/plans.jsonl as they come, and those that are there are not compiled again: with
--again what is estimated is told anew from what their compiler said. The pages of docs/plans are written from them.
Nothing is run: speed and numbers cannot be had this way.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import jax

from benchmarks import harness
from kdjax import config as configs
from kdjax.environment import compiling_for
from kdjax.plan.abstract import abstract_job
from kdjax.plan.chips import machine
from kdjax.plan.hlo import Collective
from kdjax.plan.job import plan
from kdjax.plan.measure import Compiled, told
from kdjax.plan.page import markdown

RESULTS = harness.RESULTS / "plans.jsonl"
PAGES = harness.ROOT / "docs" / "plans"
LOSSES = ("chunked", "reference")
CASES = {
    "llama31_8b_to_1b_v5e256": ("v5e:16x16", "v5p:4x4x8"),
    "qwen3_8b_to_0p6b_h100x8": ("gpu:8xH100",),
    "smollm2_1p7b_to_360m_1gpu": ("gpu:1xH100",),
}
"""Recipe -> the machines that it is planned for, with each loss."""
TRIED = {"smoke": ("cpu:2",)}
"""The same of a trial."""


def again(row: harness.Row) -> harness.Row:
    """Return a row whose estimates are made anew, from the memory and the collectives that its compiler gave."""
    old = row["plan"]
    wanted, memory, names = machine(old["topology"]), old["memory"], [field.name for field in fields(Collective)]
    found = [Collective(**{name: one[name] for name in names}) for one in old["collectives"]]
    compiled = Compiled(memory["peak"], memory["reserved"], found)
    with compiling_for(wanted.chip.kind):
        job = abstract_job(_config(old["name"], old["loss"]), jax.devices("cpu")[: wanted.device_count])
        return row | {"plan": told(job, wanted, [compiled])}


def _config(name: str, loss: str) -> Any:
    config = configs.load(str(harness.ROOT / "configs" / f"{name}.py"))
    return replace(config, objective=replace(config.objective, implementation=loss))


def page(name: str, rows: Sequence[harness.Row]) -> str:
    """Return the page of a recipe."""
    own = [row["plan"] for row in rows if row["plan"]["name"] == name]
    here = next(row["environment"] for row in rows if row["plan"]["name"] == name)
    return (
        markdown(f"Planned: {name}", own)
        + f"\nWritten by `python -m benchmarks.plans` from benchmarks/results/plans.jsonl; jax {here['jax']}, commit "
        f"{here.get('commit', 'unknown')}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the plans that are not there yet, then write the pages."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES), help="recipes to plan")
    parser.add_argument("--again", action="store_true", help="compile nothing, make the estimates anew")
    options = parser.parse_args(arguments)
    rows, environment = harness.kept(options), harness.environment()
    if options.again:
        jax.config.update("jax_num_cpu_devices", max(machine(row["plan"]["topology"]).device_count for row in rows))
        rows = [again(row) for row in rows]
        options.results.unlink()
        harness.append(options.results, rows)
    else:
        cases = TRIED if options.quick else {name: CASES[name] for name in options.only}
        rows += [harness.tell(options, row, environment) for row in _missing(rows, cases)]
    PAGES.mkdir(exist_ok=True)
    for name in CASES:
        if any(row["plan"]["name"] == name for row in rows):
            (PAGES / f"{name}.md").write_text(page(name, rows))
    return 0


def _missing(rows: Sequence[harness.Row], cases: Mapping[str, Sequence[str]]) -> Iterator[harness.Row]:
    """Yield the plans that are not there yet."""
    for name, topologies in cases.items():
        for topology, loss in itertools.product(topologies, LOSSES):
            asked = {"name": name, "topology": topology, "loss": loss}
            if any((asked | {"by": "compiler"}).items() <= row["plan"].items() for row in rows):
                continue
            began = time.perf_counter()
            row = {"what": "plan", "plan": plan(_config(name, loss), topology)}
            yield row | {
                "seconds": time.perf_counter() - began,
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }


if __name__ == "__main__":
    harness.leave(main)
