"""Memory of a step by what is trained of the student, and what quantising the teacher saves and costs.

COMMAND: python -m benchmarks.memory          (about 8 minutes on 2 CPU cores once the teacher is fetched)

Bytes of parameters and moments are counted, those that the step works with are what XLA allocates for the compiled
step; the recipe is the quickstart's. Rows go to benchmarks/results/memory.jsonl.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax

from benchmarks import harness, quick
from kdjax import config as configs
from kdjax.build import build
from kdjax.config import Config
from kdjax.console import amount, count, percent, small
from kdjax.models import byte_count, parameter_count
from kdjax.models.config import Lora, ModelSpec, Quantize
from kdjax.summary import quantizing

RESULTS = harness.RESULTS / "memory.jsonl"
RECIPE = harness.ROOT / "configs" / "quickstart.py"

TRAINED: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA of rank 64": {"lora": Lora(rank=64)},
    "LoRA of rank 8": {"lora": Lora(rank=8)},
    "LoRA of rank 8, the base in bfloat16": {"lora": Lora(rank=8), "dtype": "bfloat16"},
    "mlps alone": {"trained": ("layers/mlp",)},
    "the last norm alone": {"trained": ("final_norm",)},
}
"""What is trained -> what the student's spec says."""


def of_training(config: Config, trained: str) -> harness.Row:
    """Return the bytes of a step that trains so much of the student."""
    job = build(replace(config, student=replace(config.student, **TRAINED[trained])))
    state, frozen = job.abstract_state, job.frozen()
    batch = job.place.put_batch(next(job.data.train(None))[0])
    work = job.step.lower(state, frozen, batch).compile().memory_analysis()
    return {
        "what": "training",
        "trained": trained,
        "parameters": parameter_count(jax.eval_shape(job.student.model.init, job.keys[0])),
        "parameters_trained": parameter_count(state.params["student"]),
        "bytes_trained": byte_count(state.params["student"]),
        "bytes_moments": byte_count(state.opt_state),
        "bytes_frozen": byte_count(frozen.get("student", {})),
        "bytes_work": work.temp_size_in_bytes,
    }


def of_teachers(config: Config) -> Iterator[harness.Row]:
    """Yield the bytes of the teacher as it is and quantised, and the KL that quantising costs."""
    for kind in get_args(Quantize):
        job = build(replace(config, teacher=replace(config.teacher or ModelSpec(), quantize=kind)))
        frozen = job.frozen_teacher()
        figures = quantizing(job, frozen) | {"held_out_sha256": job.data.held_out_hash}
        layers, whole = byte_count(frozen["teacher"]["layers"]), byte_count(frozen["teacher"])
        yield {"what": "teacher", "kept": kind, "bytes": whole, "bytes_layers": layers} | figures


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the tables of docs/memory.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.memory` writes the figures that stand here."
    lines = ["| trained | parameters | of them | trained MB | moments MB | frozen MB | work MB | all MB |"]
    lines += ["|:--|--:|--:|--:|--:|--:|--:|--:|"]
    for row in (row for row in rows if row["what"] == "training"):
        parts = [row[f"bytes_{name}"] for name in ("trained", "moments", "frozen", "work")]
        cells = [amount(size / 1e6) for size in (*parts, sum(parts))]
        share = percent(row["parameters_trained"] / row["parameters"])
        lines.append(f"| {row['trained']} | {count(row['parameters_trained'])} | {share} | {' | '.join(cells)} |")
    teachers = [row for row in rows if row["what"] == "teacher"]
    lines += ["", "| teacher | MB | layers MB | share of float32 | KL from it whole (nats) | same top choice |"]
    lines += ["|:--|--:|--:|--:|--:|--:|"]
    for row in teachers:
        sizes = amount(row["bytes"] / 1e6), amount(row["bytes_layers"] / 1e6)
        cost = small(row.get("kl_quantized")), percent(row.get("agreement_quantized"))
        share = percent(row["bytes"] / teachers[0]["bytes"])
        name = "float32" if row["kept"] == "none" else row["kept"]
        lines.append(f"| {name} | {' | '.join(sizes)} | {share} | {' | '.join(cost)} |")
    here = rows[-1]["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"The quickstart's models and batch (4 × 256 tokens); KL on its held-out text, SHA-256 "
            f"`{teachers[-1]['held_out_sha256'][:16]}`. {harness.machine(here)}; "
            f"python {here['python']}, jax {here['jax']}, optax {here['optax']}; commit {here.get('commit')}.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all, in the place of what there was."""
    options = harness.parser(__doc__, RESULTS).parse_args(arguments)
    config, environment = configs.load(str(RECIPE)), harness.environment()
    with tempfile.TemporaryDirectory() as directory:
        config = quick.recipe(config, Path(directory)) if options.quick else config
        training = (of_training(config, name) for name in TRAINED)
        harness.tell_anew(options, itertools.chain(training, of_teachers(config)), environment)
    return 0


if __name__ == "__main__":
    harness.leave(main)
