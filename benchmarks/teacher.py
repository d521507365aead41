"""The teacher alone: tokens/s of its hidden states, as distillation takes them, and of its whole forward pass.

COMMAND: python -m benchmarks.teacher                                        (2 minutes on 2 CPU cores)
         python -m benchmarks.teacher --teacher.source smollm2-135m-instruct --against "--teacher.quantize int8"
         python -m benchmarks.teacher --teacher.source Qwen/Qwen3-8B --teacher.dtype bfloat16 --mesh.fsdp 8

Any field of a run's config is a flag; a model in files has its own weights, one that is only named has its sizes and
random ones. The hidden states are what the placed program of a teacher on devices of its own gives for a batch; to them
the whole pass adds the head's product and each token's log Z, a row at a time. FLOPs are those that the model's
mathematics needs, over those of a plain product in its dtype in the same rounds. Rows go to
benchmarks/results/teacher.jsonl; `python -m benchmarks.readme` puts them into benchmarks/README.md.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax

from benchmarks import harness, step
from benchmarks.prompts import said
from kdjax import config as configs
from kdjax.config import Config
from kdjax.console import amount, percent
from kdjax.errors import UserError
from kdjax.job import Job
from kdjax.losses import head_logits
from kdjax.models import byte_count, open_model
from kdjax.named import Named
from kdjax.plan.abstract import abstract_job
from kdjax.plan.flops import forward
from kdjax.shapes import Batch
from kdjax.teacher import speaking

RESULTS = harness.RESULTS / "teacher.jsonl"
QUICK = ("--batch-size", "2", "--data.sequence-length", "64")


def job_of(config: Config) -> Job:
    """Return a job whose teacher has its own weights, or random ones where they are not in files here.

    Raises:
        UserError: a config that has no teacher, or that cannot be on these devices.
    """
    if config.teacher is None:
        raise UserError("there is no teacher in the config")
    if config.mesh.placement == "pmap":
        raise UserError("mesh.placement is 'pmap'; a teacher that runs alone is placed by 'jit'")
    student, sizes = step.of_sizes(config.student), step.of_sizes(config.teacher)
    try:
        return abstract_job(replace(config, student=student), jax.devices(), open_model)
    except UserError:
        return abstract_job(replace(config, student=student, teacher=sizes), jax.devices())


def log_partition(teacher: Named, microbatches: int) -> Callable[[Any, Batch], dict[str, Any]]:
    """Return what runs a whole forward pass of a batch: ``of(frozen, batch)``, each token's log Z, [B, R]."""
    speak = speaking(teacher.model, {}, microbatches)

    def of(frozen: Any, batch: Batch) -> dict[str, Any]:
        head = teacher.model.head(frozen["teacher"])
        hidden_BRD = speak(frozen, batch)["said"]["hidden"]
        return {"log_z_BR": lax.map(lambda x_RD: jax.nn.logsumexp(head_logits(x_RD, head), axis=-1), hidden_BRD)}

    return of


def ways(config: Config, documents: int) -> tuple[Job, int, dict[str, Callable[[], Any]]]:
    """Return a job, its teacher's bytes, and each way of running it once: `hidden` and `whole`."""
    job = job_of(config)
    teacher: Any = job.teacher
    frozen, place = {"teacher": job.frozen_teacher()["teacher"]}, job.teacher_place
    rows, length, vocab = config.batch_size, config.data.sequence_length, teacher.model.config.vocab_size
    tokens_BT = np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)
    batch = place.put_batch(step.batch_of(tokens_BT, documents))
    runs = {"hidden": job.speak, "whole": place.compile_rows(log_partition(teacher, config.microbatches))}

    def once(run: Callable[..., Any]) -> Any:
        return jax.block_until_ready(run(frozen, batch))

    for run in runs.values():
        once(run)
    return job, byte_count(frozen["teacher"]), {name: partial(once, run) for name, run in runs.items()}


def measure(configurations: Sequence[Config], documents: int, rounds: int) -> list[harness.Row]:
    """Return a row of each config; all take turns."""
    made = [ways(config, documents) for config in configurations]
    dtypes = [job.config.teacher.dtype for job, *_ in made if job.config.teacher]
    products = {dtype: step.product(dtype) for dtype in dict.fromkeys(dtypes)}
    runs = {f"{n} {name}": run for n, (_, _, each) in enumerate(made) for name, run in each.items()}
    runs |= {dtype: run for dtype, (run, _) in products.items()}
    variants = [harness.Variant(name, run, rounds, 1.0, meter=harness.unmetered) for name, run in runs.items()]
    trials = harness.interleave(variants, least=rounds, on_trial=said)
    devices = 1 if jax.default_backend() == "cpu" else len(made[0][0].teacher_place.mesh.devices.flat)
    rates = {
        dtype: operations / statistics.median(trial.seconds for trial in trials[dtype].values()) * devices
        for dtype, (_, operations) in products.items()
    }
    return [
        row(job, held, {way: trials[f"{n} {way}"] for way in each}, rates[dtype])
        for n, ((job, held, each), dtype) in enumerate(zip(made, dtypes, strict=True))
    ]


def row(job: Job, held: int, trials: dict[str, Any], rate: float) -> harness.Row:
    """Return what is said of a teacher: of each way the rate of tokens and its share of what the machine can do."""
    named: Any = job.teacher
    rows, length, c = job.config.batch_size, job.config.data.sequence_length, named.model.config
    flops, head = forward(c, rows, length), 2.0 * rows * length * c.width * c.vocab_size
    useful = {"hidden": flops.weights + flops.seen}
    useful["whole"] = useful["hidden"] + head
    found: harness.Row = {
        "teacher": step.sizes(c),
        "source": job.config.teacher.source if job.config.teacher and named.file else "random",
        "dtype": named.spec.dtype,
        "quantize": named.spec.quantize,
        "bytes": held,
        "batch_size": rows,
        "sequence_length": length,
        "mesh": {"placement": job.teacher_place.by, **dict(job.teacher_place.mesh.shape)},
        "matmul_flops_per_second": rate,
        "rounds": len(trials["hidden"]),
    }
    for way, each in trials.items():
        seconds = [trial.seconds for trial in each.values()]
        median, (low, high) = statistics.median(seconds), harness.quartiles(seconds)
        found |= {
            f"{way}_tokens_per_second": rows * length / median,
            f"{way}_quartiles": (rows * length / high, rows * length / low),
            f"{way}_mfu": useful[way] / median / rate,
        }
    return found


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of benchmarks/README.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.teacher` writes the figures that stand here."
    names = "teacher", "computed in", "weights", "hidden states: tokens/s (quartiles)", "of the machine's peak"
    names += ("whole pass: tokens/s (quartiles)", "of the machine's peak", "on")
    lines = [f"| {' | '.join(names)} |", f"|:--|:--|{'--:|' * (len(names) - 3)}:--|"]
    for one in rows:
        kind = "" if one["quantize"] == "none" else f", kept in {one['quantize']}"
        mesh = "".join(f", {axis} {size}" for axis, size in one["mesh"].items() if size not in (1, "jit"))
        shape = f"{one['batch_size']} × {one['sequence_length']}{mesh}"
        cells = [
            f"{one['source']}, {one['teacher']}",
            f"{one['dtype']}{kind}, {shape}",
            f"{one['bytes'] / 1e6:,.0f} MB",
        ]
        for way in ("hidden", "whole"):
            low, high = map(amount, one[f"{way}_quartiles"])
            cells += [f"{amount(one[f'{way}_tokens_per_second'])} ({low} to {high})", percent(one[f"{way}_mfu"])]
        lines.append(f"| {' | '.join([*cells, harness.measured_on(one['environment'])])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the flags ask for; return the exit code."""
    parser = harness.parser(__doc__, RESULTS, "small rows and 3 rounds; nothing is kept")
    parser.add_argument("--rounds", type=int, default=10, help="passes of each that are timed")
    parser.add_argument("--documents", type=int, default=1, help="documents packed into a row")
    parser.add_argument("--against", nargs="+", default=[], metavar="FLAGS", help="others, by flags added to these")
    options, flags = parser.parse_known_args(arguments)
    flags = [*(QUICK if options.quick else ()), *flags]
    if options.rounds < 1 or options.documents < 1:
        raise UserError(f"--rounds is {options.rounds}, --documents {options.documents}; wanted at least 1 each")
    asked = [flags, *([*flags, *shlex.split(more)] for more in options.against)]
    wanted = [configs.override(step.shape(), each, "benchmarks.teacher") for each in asked]
    environment = harness.environment()
    rows = measure(wanted, options.documents, 3 if options.quick else options.rounds)
    rows = [{"what": "teacher"} | one | {"environment": environment} for one in rows]
    if not options.quick:
        harness.append(options.results, rows)
    print(markdown(rows), file=sys.stderr)
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    harness.leave(main)
