"""How fast data comes without a step: tokens a second of the pipeline alone, and how full its rows are, by source.

COMMAND: python -m benchmarks.data                    (13 minutes on 2 CPU cores)
         python -m benchmarks.data --sources "jsonl:my/*.jsonl" --tokenizer my/tokenizer.json

One process reads, tokenizes and packs batches of 64 rows of 512 tokens as `kdjax train` does, through its prefetching
thread; what is timed is the taking of batches, epoch after epoch, once the first ones have been taken. The time to the
first batch (reading the source, holding out, dropping what is alike) stands beside it. Each source has both kinds of
packing that it may have; what is longer than a row is left out where documents are not cut. Rows go to
benchmarks/results/data.jsonl, anew each time; `python -m benchmarks.readme` puts them into benchmarks/README.md.
"""

from __future__ import annotations

import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from typing import get_args

from benchmarks import harness
from kdjax import data
from kdjax.console import amount, percent
from kdjax.data import DataConfig, load_tokenizer
from kdjax.data.config import Packing
from kdjax.errors import UserError
from kdjax.models import open_model

RESULTS = harness.RESULTS / "data.jsonl"
SOURCES = ("python_docs", "python_questions", "python_passages", "invented")
MODEL = "smollm2-135m-instruct"
ROWS, LENGTH = 64, 512
WARM, TIMED, QUICK = 20, 60, 5
"""Batches taken before, those that are timed in each round, and those of the quick form."""


def tokenizer(named: str) -> tuple[data.Tokenizer, str]:
    """Return a tokenizer by path, SmolLM2's where none is named, or bytes where that is not at hand; and its name."""
    if named:
        return load_tokenizer(named), named
    try:
        path = open_model(MODEL).tokenizer
    except UserError as error:
        print(f"{error}; bytes as tokens instead", file=sys.stderr)
        path = None
    return (load_tokenizer(path), MODEL) if path else (load_tokenizer("bytes"), "bytes")


def measure(source: str, packing: Packing, used: data.Tokenizer, rounds: int, batches: int) -> harness.Row:
    """Return the row of a source in a packing."""
    config = DataConfig(
        sources=(source,), sequence_length=LENGTH, packing=packing, task="causal_lm", max_bad_rows=sys.maxsize
    )
    began = time.perf_counter()
    built = data.build(config, used, batch_size=ROWS)
    stream = built.train(None)
    next(stream)
    first = time.perf_counter() - began
    for _ in itertools.islice(stream, WARM):
        pass
    rates, real, places = [], 0, 0
    for _ in range(rounds):
        began = time.perf_counter()
        for batch, _ in itertools.islice(stream, batches):
            real += int((batch.student.segment_BT > 0).sum())
            places += batch.student.tokens_BT.size
        rates.append(batches * ROWS * LENGTH / (time.perf_counter() - began))
    return {
        "source": source,
        "packing": packing,
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_range": (min(rates), max(rates)),
        "fill": real / places,
        "first_batch_seconds": first,
        "documents": built.train_documents,
        "rounds": rounds,
        "batches": batches,
    }


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of benchmarks/README.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.data` writes the figures that stand here."
    names = "source", "packing", "tokens/s (range)", "fill", "first batch after", "documents"
    lines = [f"| {' | '.join(names)} |", "|:--|:--|--:|--:|--:|--:|"]
    for row in rows:
        low, high = map(amount, row["tokens_per_second_range"])
        cells = (
            row["source"],
            row["packing"],
            f"{amount(row['tokens_per_second'])} ({low} to {high})",
            percent(row["fill"]),
            f"{row['first_batch_seconds']:.1f} s",
            f"{row['documents']:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    where = f"Tokens of {rows[-1]['tokenizer']}; one process. {harness.measured_on(rows[-1]['environment'])}."
    return "\n".join([*lines, "", where])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all sources; return the exit code."""
    parser = harness.parser(__doc__, RESULTS, "the first source, a few batches; nothing is kept")
    parser.add_argument("--sources", nargs="+", default=SOURCES)
    parser.add_argument("--tokenizer", default="", help="a path; default: SmolLM2's, or bytes")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    logging.getLogger("kdjax").setLevel(logging.ERROR)  # each example that is left out would be said
    environment, rows = harness.environment(), []
    sources, rounds, batches = options.sources, options.rounds, TIMED
    if options.quick:
        sources, rounds, batches = sources[:1], 1, QUICK
    used, name = tokenizer(options.tokenizer)
    for source, packing in itertools.product(sources, get_args(Packing)):
        try:
            row = measure(source, packing, used, rounds, batches)
        except UserError as error:  # prompts with answers are not cut, say
            print(f"benchmarks.data: {source}, {packing}: {error}", file=sys.stderr, flush=True)
            continue
        rows.append(row | {"tokenizer": name, "environment": environment})
        print(f"{source}, {packing}: {amount(row['tokens_per_second'])} tokens/s", file=sys.stderr, flush=True)
    if not rows:
        return 2
    if not options.quick:
        options.results.unlink(missing_ok=True)
        harness.append(options.results, rows)
    print(markdown(rows), file=sys.stderr)
    print(json.dumps({f"{row['source']} {row['packing']}": row["tokens_per_second"] for row in rows}))
    return 0


if __name__ == "__main__":
    harness.leave(main)
