"""Distillation of every kind of model, by its recipe: what the student keeps, with a teacher and without one.

COMMAND: python -m benchmarks.kinds          (about 100 minutes on 2 CPU cores; run again to go on)
         python -m benchmarks.kinds --kinds embedding --seeds 2          (a part of it)

Each kind's teacher is made first, by its own recipe; the student is trained with it, and for comparison on the data
alone. The sentence encoder, which predicts nothing, is judged by how it orders pairs of held-out texts: Spearman's
correlation of its cosine similarities with the teacher's. Rows go to benchmarks/results/kinds.jsonl.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from scipy.stats import spearmanr

from benchmarks import harness
from kdjax import config as configs
from kdjax import data
from kdjax.config import Config
from kdjax.console import amount, count, percent, small
from kdjax.data.examples import to_example
from kdjax.data.holdout import split_documents
from kdjax.data.sources import open_source
from kdjax.models import Model, ModelFile, ModelSpec, open_model, select_layers
from kdjax.shapes import Array, View
from kdjax.train import train

RESULTS = harness.RESULTS / "kinds.jsonl"
RECIPES = harness.ROOT / "configs"
KINDS = ("masked_lm", "seq2seq", "classifier")
"""Recipes whose teacher is made by ``pretrain_`` and their name."""

TEACHER = "all-minilm-l6-v2"
"""Of the sentence encoder."""

ALPHA = {"distilled": 0.0, "data alone": 1.0}
FIGURES = ("kl_before", "kl_after", "ce_before", "ce_after", "ce_teacher", "agreement_before", "agreement_after")
FIGURES += ("parameters_teacher", "parameters_student", "steps", "train_tokens", "eval_tokens", "seconds")


def recipe(name: str, is_quick: bool) -> Config:
    """Return a recipe of configs/; as a trial in two steps."""
    config = configs.load(str(RECIPES / f"{name}.py"))
    if not is_quick:
        return config
    optim = replace(config.optim, warmup_steps=1)
    return replace(config, optim=optim, data=replace(config.data, eval_tokens=1024), steps=2, eval_every=0, prompt="")


def of_kind(config: Config, teacher: Path, objective: str, seed: int) -> harness.Row:
    """Return the figures of one student, whose teacher lies in a run directory."""
    config = replace(
        config,
        teacher=ModelSpec(source=str(teacher)),
        objective=replace(config.objective, alpha=ALPHA[objective]),
        data=replace(config.data, seed=seed),
    )
    with tempfile.TemporaryDirectory() as directory:
        summary = train(config, Path(directory) / "run")
    return {name: summary.get(name) for name in FIGURES}


def sentence_vectors(file: ModelFile, view: View) -> Array:
    """Return the mean of the last layer's hidden states over each text, one text a row of `view`, [B, D]."""
    model = Model(file.config)
    params = jax.tree.map(lambda tensor: tensor.all(), file.tensors)
    hidden_BTD = np.asarray(jax.jit(model.apply)(params, view).hidden_BTD, np.float64)
    return (hidden_BTD * (view.segment_BT > 0)[..., None]).sum(1) / (view.segment_BT > 0).sum(1)[:, None]


def similarities(vectors_BD: Array) -> Array:
    """Return the cosine of each pair of different rows."""
    unit_BD = vectors_BD / np.linalg.norm(vectors_BD, axis=-1, keepdims=True)
    return (unit_BD @ unit_BD.T)[np.triu_indices(len(unit_BD), 1)]


def held_out_texts(config: Config, file: ModelFile, most: int = 256) -> View:
    """Return the first tokens of held-out documents, one a row, each with the tokens that begin and end a text."""
    tokenizer, length = data.load_tokenizer(str(file.tokenizer)), config.data.sequence_length
    sources = [open_source(name) for name in config.data.sources]
    places = split_documents(sources, config.data).held_out[:most]
    texts = [to_example(sources[source].record(row), config.data, "").document for source, row in places]
    rows = [tokenizer.encode(text, special=True) for text in texts]
    tokens_BT, segment_BT = np.zeros((2, len(rows), length), np.int32)
    for row, ids in enumerate(rows):
        ids = ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
        tokens_BT[row, : len(ids)], segment_BT[row, : len(ids)] = ids, 1
    position_BT = np.broadcast_to(np.arange(length, dtype=np.int32)[None], tokens_BT.shape)
    return View(tokens_BT, segment_BT, position_BT)


def of_sentences(config: Config, seed: int) -> harness.Row:
    """Return the figures of the sentence encoder."""
    config = replace(config, seed=seed, data=replace(config.data, seed=seed))
    teacher = open_model(TEACHER)
    texts = held_out_texts(config, teacher)
    wanted = similarities(sentence_vectors(teacher, texts))

    def spearman(file: ModelFile) -> float:
        return float(np.asarray(spearmanr(similarities(sentence_vectors(file, texts)), wanted))[0])

    before = spearman(select_layers(teacher, config.student.keep_layers))
    with tempfile.TemporaryDirectory() as directory:
        summary = train(config, Path(directory) / "run")
        after = spearman(open_model(str(Path(directory) / "run")))
    figures = ("parameters_teacher", "parameters_student", "steps", "train_tokens", "seconds")
    figures += ("features_before", "features_after", "held_out_sha256")
    own = {"spearman_before": before, "spearman_after": after, "texts": len(texts.tokens_BT), "pairs": len(wanted)}
    return own | {name: summary.get(name) for name in figures}


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the tables of docs/models.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.kinds` writes the figures that stand here."

    def of(kind: str, objective: str, name: str) -> list[float]:
        return [row[name] for row in rows if (row["kind"], row["objective"]) == (kind, objective)]

    def shown(values: Sequence[float], show: Callable[[float], str] = amount) -> str:
        spread = f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""
        return show(statistics.mean(values)) + spread

    lines = [
        "| recipe | seeds | trained on | KL to the teacher (nats) | cross entropy (the teacher's) | same top choice |"
    ]
    lines += ["|:--|--:|:--|--:|--:|--:|"]
    for kind, objective in itertools.product(KINDS, ALPHA):
        if found := of(kind, objective, "kl_after"):
            before, teacher = of(kind, objective, "kl_before")[0], of(kind, objective, "ce_teacher")[0]
            ce, same = of(kind, objective, "ce_after"), of(kind, objective, "agreement_after")
            kl = f"{small(before)} → {shown(found, small)}"
            top = percent(statistics.mean(same))
            lines.append(f"| {kind} | {len(found)} | {objective} | {kl} | {shown(ce)} ({amount(teacher)}) | {top} |")
    lines += ["", "| recipe | seeds | parameters | Spearman's correlation before | after |", "|:--|--:|--:|--:|--:|"]
    for row in [row for row in rows if row["kind"] == "embedding"][:1]:
        sizes = f"{count(row['parameters_teacher'])} → {count(row['parameters_student'])}"
        after = of("embedding", "distilled", "spearman_after")
        lines.append(f"| embedding | {len(after)} | {sizes} | {row['spearman_before']:.3f} | {shown(after)} |")
        lines += ["", f"The correlation is over {row['pairs']:,} pairs of {row['texts']} held-out texts."]
    here = rows[-1]["environment"]
    versions = ", ".join(f"{name} {here[name]}" for name in ("python", "jax", "flax"))
    return "\n".join([*lines, f"Mean (range) over seeds; measured on {harness.machine(here)}; {versions}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=["embedding", *KINDS], choices=["embedding", *KINDS])
    options = parser.parse_args(arguments)
    done = {(row["kind"], row["objective"], row["seed"]) for row in harness.kept(options)}
    environment = harness.environment()

    def add(kind: str, objective: str, seed: int, figures: harness.Row) -> None:
        row = {"what": "kinds", "kind": kind, "objective": objective, "seed": seed} | figures
        harness.tell(options, row, environment)

    for seed in options.seeds if "embedding" in options.kinds else ():
        if ("embedding", "distilled", seed) not in done:
            add("embedding", "distilled", seed, of_sentences(recipe("embedding", options.quick), seed))
    with tempfile.TemporaryDirectory() as directory:
        for seed, kind in itertools.product(options.seeds, [kind for kind in KINDS if kind in options.kinds]):
            left = [objective for objective in ALPHA if (kind, objective, seed) not in done]
            if left:
                train(recipe(f"pretrain_{kind}", options.quick), Path(directory) / kind)
            for objective in left:
                figures = of_kind(recipe(kind, options.quick), Path(directory) / kind, objective, seed)
                add(kind, objective, seed, figures)
    return 0


if __name__ == "__main__":
    harness.leave(main)
