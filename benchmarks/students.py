"""How far students cut out of SmolLM2-135M-Instruct are from it before any training, by what was cut and how chosen.

COMMAND: python -m benchmarks.students          (about 6 minutes on 2 CPU cores)

Rows are written to benchmarks/results/students.jsonl, anew each time; `python -m benchmarks.readme` puts them into
docs/students.md. Importance is measured on training text, all figures on held-out text.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness
from kdjax import data
from kdjax.build import Named
from kdjax.console import amount, count, percent
from kdjax.data import DataConfig
from kdjax.models import Cut, Importance, Model, ModelFile, open_model, parameter_count
from kdjax.models.prune import pick, take
from kdjax.sharding import MeshConfig, placement
from kdjax.student import divergence, scored

RESULTS = harness.RESULTS / "students.jsonl"
TEACHER = "smollm2-135m-instruct"
ROWS, TOKENS, BATCH = 32, 256, 4

CASES = (
    ("15 of 30 layers", "even", Cut(layers=15, choose="even")),
    ("15 of 30 layers", "ends", Cut(layers=15, choose="ends")),
    ("15 of 30 layers", "importance", Cut(layers=15, choose="importance")),
    ("24 of 30 layers", "even", Cut(layers=24, choose="even")),
    ("24 of 30 layers", "ends", Cut(layers=24, choose="ends")),
    ("24 of 30 layers", "importance", Cut(layers=24, choose="importance")),
    ("768 of 1,536 neurons of each mlp", "importance", Cut(mlp=768)),
    ("768 of 1,536 neurons of each mlp", "random", Cut(mlp=768)),
    ("2 of 3 key/value heads, 6 of 9 heads", "importance", Cut(kv_heads=2)),
    ("2 of 3 key/value heads, 6 of 9 heads", "random", Cut(kv_heads=2)),
    ("384 of 576 channels", "importance", Cut(width=384)),
    ("384 of 576 channels", "random", Cut(width=384)),
    ("15 of 30 layers", "untrained", Cut(layers=15)),
)
"""What is kept, how it is chosen, the cut; `untrained` is a random model of the same shape."""


def at_random(scores: Importance) -> Importance:
    """Return scores that are drawn."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.random(score.shape) for name, score in vars(scores).items() if score is not None}
    return replace(scores, **drawn)


def students(teacher: ModelFile, scores: Importance, by: str, cut: Cut) -> ModelFile:
    """Return the student of a case."""
    return take(teacher, pick(teacher.config, cut, at_random(scores) if by == "random" else scores))


def measure() -> list[harness.Row]:
    """Return the rows of all cases, the teacher's first."""
    teacher, place, key = open_model(TEACHER), placement(MeshConfig()), jax.random.key(0)
    text = DataConfig(sequence_length=TOKENS, eval_tokens=ROWS * TOKENS)
    if teacher.tokenizer is None:
        raise SystemExit(f"{TEACHER} has no tokenizer")
    loader = data.build(text, data.load_tokenizer(teacher.tokenizer), batch_size=BATCH)
    scores = scored(teacher, place, [batch for batch, _ in itertools.islice(loader.train(), ROWS // BATCH)], "float32")
    taught, batches, rows = Named(Model(teacher.config), teacher, TEACHER), loader.evaluation(BATCH), []
    frozen = {"teacher": taught.params(place, key)}
    facts = {"what": "students", "teacher": TEACHER, "held_out_sha256": loader.held_out_hash}
    for kept, by, cut in CASES:
        file = students(teacher, scores, by, cut)
        named = Named(Model(file.config), None if by == "untrained" else file, kept)
        params = named.params(place, key)
        figures = divergence(place, named, params, taught, frozen, batches)
        row = facts | {"kept": kept, "by": by, "parameters": parameter_count(params)}
        rows.append(row | {name: figures[name] for name in FIGURES})
        print(json.dumps(rows[-1]), flush=True)
    return rows


FIGURES = ("kl", "agreement", "perplexity", "teacher_perplexity", "tokens")


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/students.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.students` writes the figures that stand here."
    lines = ["| kept | chosen by | parameters | KL to the teacher (nats) | top-1 agreement | perplexity |"]
    lines += ["|:--|:--|--:|--:|--:|--:|"]
    lines += [f"| all: the teacher | – | – | – | – | {amount(rows[0]['teacher_perplexity'])} |"]
    for row in rows:
        figures = amount(row["kl"]), percent(row["agreement"]), amount(row["perplexity"])
        lines.append(f"| {row['kept']} | {row['by']} | {count(row['parameters'])} | {' | '.join(figures)} |")
    return "\n".join([*lines, "", _measured_on(rows[-1])])


def _measured_on(row: harness.Row) -> str:
    return (
        f"{row['teacher']}, on {row['tokens']:,.0f} held-out tokens of `python_docs` with SHA-256 "
        f"`{row['held_out_sha256'][:16]}`; importance on {ROWS * TOKENS:,} tokens of its training text; *random* is "
        f"one draw. {harness.measured_on(row['environment'])}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH")
    options = parser.parse_args(arguments)
    environment = harness.environment()
    rows = [row | {"environment": environment} for row in measure()]
    options.results.unlink(missing_ok=True)
    harness.append(options.results, rows)


if __name__ == "__main__":
    main()
