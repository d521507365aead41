"""The whole distillation step: its rate, which part takes the time, its share of the machine's peak, its memory.

COMMAND: python -m benchmarks.step                                    (2 minutes on 2 CPU cores)
         python -m benchmarks.step --teacher.dtype bfloat16 --student.dtype bfloat16
         python -m benchmarks.step --against "--mesh.placement pmap"  (two of them, step by step in turn)

Any field of a run's config is a flag, so mesh, batch, packing and sizes are set as for training; a model that is named
(--teacher.source Qwen/Qwen3-8B) has its sizes and random weights. Rows are full, of random tokens, with so many
documents each. A step counts from a batch in the host's memory to the new state. Shares are of a trace's operations
(`--profile.steps` of a run); with them a model's FLOPs give its own utilisation of what a plain product of matrices, of
the size that is fastest, reaches in the same rounds. Memory is what the device says, or the most that the process held
on a CPU. Rows go to benchmarks/results/step.jsonl; `python -m benchmarks.readme` puts them into benchmarks/README.md.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.prompts import SHAPE, said
from kdjax import config as configs
from kdjax import profile
from kdjax.config import Config
from kdjax.console import amount, percent
from kdjax.data import DataConfig
from kdjax.errors import UserError
from kdjax.job import Job
from kdjax.models import ModelSpec, byte_count
from kdjax.models.known import known_architecture
from kdjax.optim import OptimConfig
from kdjax.plan.abstract import abstract_job
from kdjax.plan.flops import Flops
from kdjax.shapes import Batch, View
from kdjax.utilisation import flops_of

RESULTS = harness.RESULTS / "step.jsonl"
SIDES = (1024, 2048, 4096)
"""Of the square matrices whose product measures the machine's rate: the side that is fastest does, in as many products
as take the operations of one of the largest."""
TRACED = profile.Span(1, 2)
QUICK = ("--batch-size", "2", "--data.sequence-length", "64")


def shape() -> Config:
    """Return the default: a teacher of SmolLM2-135M's shape and a student of 4 layers and width 384, in float32."""
    student = replace(SHAPE, width=384, layers=4, heads=6, kv_heads=2, mlp_width=1024)
    return Config(
        name="step",
        teacher=ModelSpec(architecture=SHAPE),
        student=ModelSpec(architecture=student),
        data=DataConfig(tokenizer="bytes", sequence_length=256),
        optim=OptimConfig(learning_rate=1e-4),
        batch_size=4,
    )


def of_sizes(spec: ModelSpec) -> ModelSpec:
    """Return a model as random weights of the same sizes."""
    known = None if spec.source == "random" else known_architecture(spec.source)
    return spec if known is None else replace(spec, source="random", architecture=known)


def random_batch(config: Config, documents: int) -> Batch:
    """Return full rows of random tokens, each of so many documents of equal length.

    Raises:
        UserError: rows that do not split into so many.
    """
    rows, length, vocab = config.batch_size, config.data.sequence_length, config.student.architecture.vocab_size
    return batch_of(np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32), documents)


def batch_of(tokens_BT: np.ndarray, documents: int) -> Batch:
    """Return full rows of tokens as a batch; every token counts but a document's last, which has none after it.

    Raises:
        UserError: rows that do not split into so many documents.
    """
    rows, length = tokens_BT.shape
    each = length // documents
    if each * documents != length or each < 2:
        raise UserError(f"rows of {length} tokens do not split into {documents} documents; wanted a divisor")
    position_BT = np.tile(np.arange(each, dtype=np.int32), (rows, documents))
    segment_BT = np.tile(np.repeat(np.arange(1, documents + 1, dtype=np.int32), each), (rows, 1))
    weight_BT = (position_BT < each - 1).astype(np.float32)
    row_BT = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    view = View(tokens_BT, segment_BT, position_BT)
    return Batch(view, row_BT, np.roll(tokens_BT, -1, 1), weight_BT, weight_BT)


@dataclass
class Training:
    """A step that can be taken again and again.

    Attributes:
        batch: as it comes from the pipeline.
        state: after the newest step.
    """

    job: Job
    frozen: dict[str, Any]
    batch: Batch
    state: Any

    def step(self) -> dict[str, Any]:
        """Take one, wait for it, and return its metrics."""
        self.state, metrics = self.job.step(self.state, *self.job.given(self.frozen, self.batch, trains=True))
        return jax.block_until_ready((self.state, metrics))[1]


def training(config: Config, documents: int) -> Training:
    """Return a config's step with random weights, compiled and warm.

    Raises:
        UserError: a config that cannot be on these devices, or that has no teacher.
    """
    if config.teacher is None:
        raise UserError("there is no teacher in the config; the step is that of distillation")
    config = replace(config, teacher=of_sizes(config.teacher), student=of_sizes(config.student))
    job = abstract_job(config, jax.devices())
    made = Training(job, job.frozen(), random_batch(config, documents), job.start())
    made.step()
    made.step()
    return made


def shares(made: Training) -> dict[str, float]:
    """Return which share of the devices' time each region of a step has, by a trace of two steps."""
    with tempfile.TemporaryDirectory() as directory:
        tracer = profile.Tracer(Path(directory), TRACED)
        for number in (TRACED.first, TRACED.last):
            with tracer.step(number, made.state):
                made.step()
        trace = tracer.stop()
    placed = made.job.place.put_batch(made.batch)
    lowered = made.job.lowered(made.state, made.frozen, placed)
    return profile.shares(trace, *(each.compile().as_text() for each in lowered))


def product(dtype: str) -> tuple[Callable[[], Any], float]:
    """Return what multiplies two square matrices on one device, of the side that is fastest, and its operations."""
    of = jax.jit(jnp.matmul)

    def run(side: int) -> Callable[[], Any]:
        square, times = jnp.ones((side, side), dtype), (max(SIDES) // side) ** 3
        of(square, square)
        return lambda: jax.block_until_ready([of(square, square) for _ in range(times)][-1])

    variants = [harness.Variant(str(side), run(side), 2, 1.0, meter=harness.unmetered) for side in SIDES]
    trials = harness.interleave(variants, least=2)
    best = min(variants, key=lambda variant: min(trial.seconds for trial in trials[variant.name].values()))
    return best.run, 2.0 * max(SIDES) ** 3


def measure(configurations: Sequence[Config], documents: int, rounds: int) -> list[harness.Row]:
    """Return a row of each config; several take their steps in turn, and each but the first has its ratio to that."""
    harness.reset_peak()
    made = [training(config, documents) for config in configurations]
    ready, operations = product(made[0].job.config.student.dtype)
    variants = [
        harness.Variant(str(n), one.step, rounds, 1.0, meter=harness.unmetered) for n, one in enumerate(made)
    ] + [harness.Variant("product", ready, rounds, 1.0, meter=harness.unmetered)]
    trials = harness.interleave(variants, least=rounds, on_trial=said)
    peak = harness.peak_bytes() if len(made) == 1 else None
    rate = operations / statistics.median(trial.seconds for trial in trials["product"].values())
    rate *= 1 if jax.default_backend() == "cpu" else len(made[0].job.devices)  # a CPU's devices share its cores
    return [row(one, trials, str(n), rate, peak) for n, one in enumerate(made)]


def row(made: Training, trials: harness.Trials, name: str, rate: float, peak: int | None) -> harness.Row:
    """Return what is said of one config's steps."""
    job, config = made.job, made.job.config
    seconds = [trial.seconds for trial in trials[name].values()]
    median, flops, found = statistics.median(seconds), flops_of(job), shares(made)
    teacher, student = (named.model.config for named in (job.teacher, job.student) if named is not None)
    return {
        "tokens_per_second": config.batch_size * config.data.sequence_length / median,
        "step_seconds": median,
        "step_seconds_quartiles": harness.quartiles(seconds),
        "rounds": len(seconds),
        "peak_memory_gb": None if peak is None else peak / 1e9,
        "bytes": {
            "teacher": byte_count(made.frozen["teacher"]),
            "student": byte_count(made.state.params["student"]),
            "optimizer": byte_count(made.state.opt_state),
        },
        "ratio": None if name == "0" else 1 / (harness.ratio(trials[name], trials["0"]) or 1.0),
        "shares": found,
        "flops": asdict(flops) | {"done": flops.done},
        "matmul_flops_per_second": rate,
        "floor_seconds": flops.done / rate,
        "mfu": flops.useful / median / rate,
        **of_models(flops, found, median * rate),
        "teacher": sizes(teacher),
        "student": sizes(student),
        "teacher_dtype": config.teacher.dtype if config.teacher else None,
        "student_dtype": config.student.dtype,
        "batch_size": config.batch_size,
        "sequence_length": config.data.sequence_length,
        "documents": int(made.batch.student.segment_BT.max()),
        "microbatches": config.microbatches,
        "mesh": {"placement": job.place.by, **dict(job.place.mesh.shape)},
        "teacher_devices": job.teacher_place.mesh.size if job.apart else 0,
    }


def of_models(flops: Flops, found: dict[str, float], could: float) -> dict[str, float]:
    """Return each model's share of what the machine could compute in the time that the model took: `could` in all."""
    own = {"teacher": flops.teacher, "student": flops.student + flops.recompute}
    return {f"utilisation_{name}": amount / could / found[name] for name, amount in own.items() if found.get(name)}


def sizes(c: Any) -> str:
    """Return a model's sizes in a few words."""
    return f"{c.layers} layers of width {c.width}, {c.vocab_size:,} tokens"


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of benchmarks/README.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.step` writes the figures that stand here."
    names = "dtype, batch, placement", "tokens/s (quartiles)", "step", "of the machine's peak", "teacher, student"
    names += ("time: teacher, student, loss, optimiser", "peak memory", "on")
    lines = [f"| {' | '.join(names)} |", "|:--|--:|--:|--:|--:|--:|--:|:--|"]
    for one in rows:
        tokens = one["batch_size"] * one["sequence_length"]
        low, high = (amount(tokens / seconds) for seconds in reversed(one["step_seconds_quartiles"]))
        mesh = ", ".join(f"{axis} {size}" for axis, size in one["mesh"].items() if size not in (1, "jit"))
        what = f"{one['student_dtype']}, {one['batch_size']} × {one['sequence_length']}{mesh and ', ' + mesh}"
        cells = (
            what,
            f"{amount(one['tokens_per_second'])} ({low} to {high})",
            f"{one['step_seconds']:.3g} s",
            percent(one["mfu"]),
            ", ".join(percent(one.get(f"utilisation_{name}")) for name in ("teacher", "student")),
            ", ".join(percent(one["shares"].get(name)) for name in profile.REGIONS),
            "–" if one["peak_memory_gb"] is None else f"{one['peak_memory_gb']:.2f} GB",
            harness.measured_on(one["environment"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    pairs = {f"teacher {one['teacher']}; student {one['student']}" for one in rows}
    return "\n".join([*lines, "", f"Models of random weights: {'; '.join(sorted(pairs))}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the flags ask for; return the exit code."""
    parser = harness.parser(__doc__, RESULTS, "small rows and 3 rounds; nothing is kept")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each that are timed")
    parser.add_argument("--documents", type=int, default=1, help="documents packed into a row")
    parser.add_argument("--against", default="", metavar="FLAGS", help="a second config, by flags added to the others")
    options, flags = parser.parse_known_args(arguments)
    flags = [*(QUICK if options.quick else ()), *flags]
    if options.rounds < 1 or options.documents < 1:
        raise UserError(f"--rounds is {options.rounds}, --documents {options.documents}; wanted at least 1 each")
    asked = [flags, [*flags, *shlex.split(options.against)]] if options.against else [flags]
    wanted = [configs.override(shape(), each, "benchmarks.step") for each in asked]
    environment = harness.environment()
    rows = measure(wanted, options.documents, 3 if options.quick else options.rounds)
    rows = [one | {"environment": environment} for one in rows]
    if not options.quick:
        harness.append(options.results, rows)
    print(markdown(rows), file=sys.stderr)
    print(json.dumps(rows[0] if len(rows) == 1 else {"rows": rows}))
    return 0


if __name__ == "__main__":
    harness.leave(main)
