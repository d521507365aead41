"""What a teacher's cache costs and what it keeps: bytes a token beside the gradient's error, and rates of both ways.

COMMAND: python -m benchmarks.cache                     (about 15 minutes on 2 CPU cores)

The gradient is that of forward KL at temperature 1, of all parameters of the student of configs/quickstart.py before
its first step, on one batch of the documentation; its error is the norm of the difference from the live teacher's, over
the norm of that. Draws are taken anew with each of some seeds: the error of one, and of the mean gradient over all,
which falls with their number where draws are unbiased. Bytes are those of whole records, tokens included, before they
are compressed, and in a shard. The gradient's time is that of the whole student's from what is kept, over that of the
cross entropy alone, median of interleaved rounds. The rates are the host's, of packing and of reading batches. Rows go
to benchmarks/results/cache.jsonl, of which docs/cache.svg is drawn; `python -m benchmarks.readme` makes the table.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from benchmarks import harness
from kdjax import config as configs
from kdjax.build import build
from kdjax.config import Config
from kdjax.console import amount, percent
from kdjax.data.cache import Cache, cached, digest, of_record, record, shard_name, write_shard
from kdjax.data.packing import to_batch
from kdjax.data.signals import Settings, packed
from kdjax.job import Job
from kdjax.losses import ObjectiveConfig
from kdjax.step import gradient
from kdjax.teacher import Saying, brought, no_teacher, speaking

RESULTS = harness.RESULTS / "cache.jsonl"
PICTURE = harness.ROOT / "docs" / "cache.svg"
RECIPE = harness.ROOT / "configs" / "quickstart.py"
SEEDS = 16
ROUNDS = 7
"""In which the gradients are timed, one of each kind in turn."""
READ = 64
"""Batches that are read."""
PUBLISHED = (114, 300)
"""Bytes a token of DistillKit's compressed top-k, as its README names them (github.com/arcee-ai/DistillKit)."""


class Case(NamedTuple):
    """What is kept: a kind, its entries or draws, and the bits of a number."""

    kind: str
    picks: int
    bits: int

    def __str__(self) -> str:
        """Return it in a few words."""
        return {
            "topk": f"top-{self.picks}, {self.bits} bits",
            "sampled": f"{self.picks} draws, {self.bits} bits",
            "hidden": f"hidden state, {'bfloat16' if self.bits == 16 else 'int8'}",
        }[self.kind]


CASES = (
    *(Case("topk", picks, 8) for picks in (8, 16, 32, 64, 128)),
    Case("topk", 64, 16),
    *(Case("sampled", picks, 8) for picks in (12, 25, 50)),
    Case("hidden", 0, 8),
    Case("hidden", 0, 16),
)


class Bench:
    """A job, one batch of it, and the live teacher's gradient there."""

    def __init__(self, config: Config, seeds: int = SEEDS) -> None:
        """Build it; draws are taken with so many seeds."""
        self.seeds = seeds
        self.job: Any = build(config)
        self.rows = next(self.job.data.rows())[0]
        self.batch = to_batch(self.rows)
        self.state, self.frozen = self.job.start(), self.job.frozen()
        self.head = {"teacher_head": self.job.teacher.model.head_part(self.frozen["teacher"])}
        self.live = self.flat(gradient, self.job.recipe)(self.state, self.frozen, self.job.place.put_batch(self.batch))
        told = replace(self.job.recipe, signal_of=brought(self.job.teacher.model))
        self.of_said = self.flat(gradient, told)
        self.given: dict[Case, Any] = {}

    def flat(self, of: Any, recipe: Any) -> Any:
        """Return what gives a gradient as one vector."""
        return jax.jit(lambda *given: ravel_pytree(of(recipe, *given)[0])[0])

    def said(self, case: Case, seed: int) -> list[dict[str, np.ndarray]]:
        """Return what the teacher says of each row."""
        saying = Saying(case.kind, case.picks, 1.0, seed)
        run = self.job.place.compile_rows(speaking(self.job.teacher.model, {}, self.job.config.microbatches, saying))
        numbers = np.arange(len(self.rows), dtype=np.int32)
        found = run(self.frozen, self.job.place.put_batch(replace(self.batch, signal={"row_B": numbers})))
        arrays = self.job.place.own_rows(found["said"])
        return [{name: x[n] for name, x in arrays.items()} for n in range(len(self.rows))]

    def records(self, case: Case, said: Sequence[dict[str, np.ndarray]]) -> list[bytes]:
        """Return the rows as they are kept."""
        counts = np.sum(self.batch.kd_weight_BR != 0, axis=1).tolist()
        pairs = zip(self.rows, counts, said, strict=True)
        settings = self.settings(case)
        return [record(row, packed(case.kind, of_row, count, settings)) for row, count, of_row in pairs]

    def settings(self, case: Case) -> Settings:
        """Return how a case is kept."""
        return Settings(self.job.student.model.config.vocab_size, case.bits, case.picks)

    def error(self, gradients: Sequence[Any]) -> float:
        """Return the error of the mean of some gradients, of the live one's norm."""
        mean = sum(gradients[1:], gradients[0]) / len(gradients)
        return float(jnp.linalg.norm(mean - self.live) / jnp.linalg.norm(self.live))

    def row(self, case: Case) -> harness.Row:
        """Return the figures of a case."""
        gradients, sizes, rates = [], [], []
        tokens = int(np.sum(self.batch.kd_weight_BR != 0))
        for seed in range(self.seeds if case.kind == "sampled" else 1):
            said = self.said(case, seed)
            began = time.perf_counter()
            records = self.records(case, said)
            rates.append(tokens / (time.perf_counter() - began))
            sizes.append(sum(map(len, records)) / tokens)
            rows = [of_record(content, case.kind, self.settings(case)) for content in records]
            given = self.job.place.put_batch(to_batch(rows))
            gradients.append(self.of_said(self.state, self.head, given))
            self.given[case] = given
        alone = [self.error([one]) for one in gradients]
        return {
            **case._asdict(),
            "bytes_per_token": statistics.fmean(sizes),
            "error": statistics.fmean(alone),
            "error_of_mean": self.error(gradients),
            "seeds": len(gradients),
            "packed_tokens_per_second": statistics.median(rates),
            **on_disk(self.job, case, self.settings(case), records, tokens),
            "tokens": tokens,
        }

    def costs(self, rounds: int) -> dict[Case, float]:
        """Return how long the gradient takes from what was kept of each case, of the cross entropy's alone."""
        alone = replace(self.job.recipe, signal_of=no_teacher, objective=ObjectiveConfig(alpha=1.0))
        plain, batch = self.flat(gradient, alone), self.job.place.put_batch(self.batch)

        def variant(name: str, of: Any, *given: Any) -> harness.Variant:
            run = lambda: of(self.state, *given).block_until_ready()  # noqa: E731
            run()
            return harness.Variant(name, run, rounds, 1.0, meter=harness.unmetered)

        variants = [variant("alone", plain, {}, batch)]
        variants += [variant(str(case), self.of_said, self.head, given) for case, given in self.given.items()]
        trials = harness.interleave(variants, least=rounds)
        return {case: harness.ratio(trials[str(case)], trials["alone"]) or 0.0 for case in self.given}


def on_disk(job: Job, case: Case, settings: Settings, records: Sequence[bytes], tokens: int) -> harness.Row:
    """Return what a shard of many such rows takes a token, and the rate at which training's batches come from it."""
    size = job.config.batch_size
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        contents = list(records) * READ
        shard = write_shard(home / shard_name("train", 0, 0, 1), contents)
        kept = {"kind": case.kind, "bits": case.bits, "picks": case.picks, "temperature": 1.0}
        told = dict.fromkeys(("train_documents", "held_out_documents", "held_out_dropped"), 0)
        manifest = {
            "batch_size": size,
            "parts": 1,
            "shard_batches": READ,
            "kept": {"train": kept},
            "vocab_size": settings.vocab_size,
            "shards": [shard],
            "sha256": digest(home / shard["name"]),
            "data": told | {"held_out_sha256": ""},
        }
        stream: Iterator[Any] = cached(Cache(home, manifest), 0, batch_size=size).train()
        next(stream)
        began = time.perf_counter()
        for _ in islice(stream, READ - 8):
            pass
        rate = (READ - 8) * size * job.config.data.sequence_length / (time.perf_counter() - began)
        return {"disk_bytes_per_token": shard["bytes"] / (READ * tokens), "read_tokens_per_second": rate}


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/teachers.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.cache` writes the figures that stand here."
    heads = ["kept of a token", "bytes a token", "on disk", "error of the gradient", "of the mean over seeds"]
    heads += ["gradient's time", "packed (tokens/s)", "read (tokens/s)"]
    lines = [f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
    for row in rows:
        mean = f"{percent(row['error_of_mean'])} ({row['seeds']})" if row["seeds"] > 1 else "the same"
        cells = [
            str(Case(row["kind"], row["picks"], row["bits"])),
            f"{row['bytes_per_token']:,.1f}",
            f"{row['disk_bytes_per_token']:,.1f}",
            percent(row["error"]),
            mean,
            f"{row['gradient_ratio']:.2f}" if "gradient_ratio" in row else "not measured yet",
            *(amount(row[f"{name}_tokens_per_second"]) for name in ("packed", "read")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    last = rows[-1]
    return "\n".join(
        [
            *lines,
            "",
            "![Bytes a token beside the gradient's error](cache.svg)",
            "",
            f"{last['tokens']:,} tokens of one batch of `configs/quickstart.py`, a vocabulary of "
            f"{last['vocab_size']:,}. {harness.measured_on(last['environment'])}.",
        ]
    )


def picture(rows: Sequence[harness.Row]) -> Figure:
    """Return the gradient's error beside bytes a token; hollow: of the mean over seeds."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for n, (kind, label) in enumerate(
        {"topk": "top-k and its tail", "sampled": "draws", "hidden": "hidden state"}.items()
    ):
        own = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["bytes_per_token"])
        x, y = [row["bytes_per_token"] for row in own], [100 * row["error"] for row in own]
        axes.plot(x, y, "o-" if kind != "topk" else "s-", color=f"C{n}", label=label)
        if kind == "sampled":
            means = [100 * row["error_of_mean"] for row in own]
            axes.plot(
                x, means, "o--", color=f"C{n}", markerfacecolor="white", label=f"mean over {own[0]['seeds']} seeds"
            )
    for n, size in enumerate(PUBLISHED):
        axes.axvline(size, color="grey", lw=0.8, ls=":", label=None if n else "DistillKit's sizes")
    axes.set(xscale="log", yscale="log", xlabel="bytes a token", ylabel="error of the gradient, %")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case."""
    parser = harness.parser(__doc__, RESULTS, "a few cases of configs/smoke.py; nothing is kept")
    parser.add_argument("--recipe", default=str(RECIPE), metavar="CONFIG")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PATH")
    options, flags = parser.parse_known_args(arguments)
    objective = ObjectiveConfig(alpha=0.0, temperature=1.0)
    recipe = str(harness.ROOT / "configs" / "smoke.py") if options.quick else options.recipe
    config = replace(configs.override(configs.load(recipe), flags, "benchmarks.cache"), objective=objective)
    environment, bench, rows = harness.environment(), Bench(config, 4 if options.quick else SEEDS), []
    vocab = bench.job.student.model.config.vocab_size
    for case in CASES[2::3] if options.quick else CASES:
        if case.picks > vocab:
            continue
        row = {"what": "cache", "vocab_size": vocab} | bench.row(case) | {"environment": environment}
        rows.append(row)
        said = f"{case}: {row['bytes_per_token']:.1f} bytes, error {percent(row['error'])}"
        print(said, file=sys.stderr, flush=True)
    for row, ratio in zip(rows, bench.costs(2 if options.quick else ROUNDS).values(), strict=True):
        row["gradient_ratio"] = ratio
    if not options.quick:
        options.results.unlink(missing_ok=True)
        harness.append(options.results, rows)
        with matplotlib.rc_context({"svg.hashsalt": "kdjax"}):
            picture(rows).savefig(options.picture, metadata={"Date": None})
    print(markdown(rows), file=sys.stderr)
    print(json.dumps({"rows": [{name: x for name, x in row.items() if name != "environment"} for row in rows]}))
    return 0


if __name__ == "__main__":
    harness.leave(main)
