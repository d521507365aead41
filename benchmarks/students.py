"""How far students cut out of SmolLM2-135M-Instruct are from it before any training, by what was cut and how chosen.

COMMAND: python -m benchmarks.students          (about 6 minutes on 2 CPU cores)

Rows are written to benchmarks/results/students.jsonl, anew each time; `python -m benchmarks.readme` puts them into
docs/students.md. Importance is measured on training text, all figures on held-out text.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness, quick
from kdjax import data
from kdjax.build import Named
from kdjax.console import amount, count, percent
from kdjax.data import DataConfig
from kdjax.models import Cut, Importance, Model, ModelConfig, ModelFile, open_model, parameter_count
from kdjax.models.prune import pick, take
from kdjax.sharding import MeshConfig, placement
from kdjax.student import divergence, scored

RESULTS = harness.RESULTS / "students.jsonl"
TEACHER = "smollm2-135m-instruct"
ROWS, TOKENS, BATCH = 32, 256, 4

Case = tuple[str, str, Cut]
"""What is kept, how it is chosen, the cut; `untrained` is a random model of the same shape."""


def cases(c: ModelConfig) -> list[Case]:
    """Return what is cut out of a model: of layers, of each mlp, of heads and of channels."""
    half, most, mlp, width = c.layers // 2, c.layers * 4 // 5, c.mlp_width // 2, c.width * 2 // 3
    kv_heads, heads = c.kv_heads * 2 // 3, c.heads * 2 // 3
    layers: list[Case] = [
        (f"{kept} of {c.layers} layers", choose, Cut(layers=kept, choose=choose))
        for kept in (half, most)
        for choose in ("even", "ends", "importance")
    ]
    parts = {
        f"{mlp:,} of {c.mlp_width:,} neurons of each mlp": Cut(mlp=mlp),
        f"{kv_heads} of {c.kv_heads} key/value heads, {heads} of {c.heads} heads": Cut(kv_heads=kv_heads),
        f"{width} of {c.width} channels": Cut(width=width),
    }
    chosen = [(name, by, cut) for name, cut in parts.items() for by in ("importance", "random")]
    return [*layers, *chosen, (layers[0][0], "untrained", Cut(layers=half))]


def at_random(scores: Importance) -> Importance:
    """Return scores that are drawn."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.random(score.shape) for name, score in vars(scores).items() if score is not None}
    return replace(scores, **drawn)


def students(teacher: ModelFile, scores: Importance, by: str, cut: Cut) -> ModelFile:
    """Return the student of a case."""
    return take(teacher, pick(teacher.config, cut, at_random(scores) if by == "random" else scores))


def measure(name: str, rows: int) -> Iterator[harness.Row]:
    """Yield the row of each case of a teacher, importance and figures of so many rows of text."""
    teacher, place, key = open_model(name), placement(MeshConfig()), jax.random.key(0)
    text = DataConfig(sequence_length=TOKENS, eval_tokens=rows * TOKENS)
    if teacher.tokenizer is None:
        raise SystemExit(f"{name} has no tokenizer")
    loader = data.build(text, data.load_tokenizer(teacher.tokenizer), batch_size=BATCH)
    scores = scored(teacher, place, [batch for batch, _ in itertools.islice(loader.train(), rows // BATCH)], "float32")
    taught, batches = Named(Model(teacher.config), teacher, name), loader.evaluation(BATCH)
    frozen = {"teacher": taught.params(place, key)}
    facts = {"what": "students", "teacher": name, "held_out_sha256": loader.held_out_hash}
    for kept, by, cut in cases(teacher.config):
        file = students(teacher, scores, by, cut)
        named = Named(Model(file.config), None if by == "untrained" else file, kept)
        params = named.params(place, key)
        figures = divergence(place, named, params, taught, frozen, batches)
        row = facts | {"kept": kept, "by": by, "parameters": parameter_count(params)}
        yield row | {name: figures[name] for name in FIGURES}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases, in the place of what there was."""
    options, environment = harness.parser(__doc__, RESULTS).parse_args(arguments), harness.environment()
    with tempfile.TemporaryDirectory() as directory:
        teacher, rows = (quick.model(Path(directory)), BATCH) if options.quick else (TEACHER, ROWS)
        harness.tell_anew(options, measure(teacher, rows), environment)
    return 0


if __name__ == "__main__":
    harness.leave(main)
