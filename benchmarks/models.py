"""What each family of models can do here: read, export, generate and distil, each measured on a tiny random model.

COMMAND: python -m benchmarks.models          (a few minutes on 2 CPU cores; with torch and transformers also exports)

The models, and what transformers makes of them, are those of tests/golden. Rows are written to
benchmarks/results/models.jsonl, anew each time; `python -m benchmarks.readme` puts them into docs/models.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import harness, loss_peers
from kdjax.evaluate import sums_of
from kdjax.generate import generate
from kdjax.losses import ObjectiveConfig, head_logits
from kdjax.models import Model, ModelConfig, export, open_model, select_layers
from kdjax.models.registry import FAMILIES
from kdjax.shapes import Array, Batch, View
from kdjax.step import Recipe, init_state, step
from kdjax.teacher import live_teacher

GOLDEN = harness.ROOT / "tests" / "golden"
RESULTS = harness.RESULTS / "models.jsonl"
STEPS, ROWS, TOKENS = 100, 16, 16
KEPT = (0, 2)
"""The teacher's layers, of three, that the student is made of."""


PIECES = ((0, 5, 0, 0), (1, 7, 0, 5), (1, 8, 1, 4))
"""Of the packed texts: which text, how many of its tokens, and the row and the column where they begin."""

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "embedding": "AutoModel",
}
"""`ModelConfig.task` -> the class of transformers that loads such a model."""


def view(config: ModelConfig, tokens_BT: Array) -> View:
    """Return tokens, a text a row, as a model sees them; a decoder with an encoder sees them backwards."""
    tokens_BT = np.asarray(tokens_BT, np.int32)
    position_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32)[None], tokens_BT.shape)
    seen = View(tokens_BT, np.ones_like(tokens_BT), position_BT)
    return replace(seen, tokens_BT=tokens_BT[:, ::-1], encoder=seen) if config.encoder_layers else seen


def packed(config: ModelConfig, tokens_BT: Array) -> View:
    """Return the `PIECES` of two texts, the last of them behind padding."""
    tokens_BT, number = np.asarray(tokens_BT, np.int32), 0
    seen = [np.full_like(tokens_BT, 7), np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)]
    backwards_BT = seen[0].copy()
    for number, (text, length, row, start) in enumerate(PIECES, 1):
        place = row, slice(start, start + length)
        seen[0][place], seen[1][place], seen[2][place] = tokens_BT[text, :length], number, np.arange(length)
        backwards_BT[place] = tokens_BT[text, :length][::-1]
    whole = View(*seen)
    return replace(whole, tokens_BT=backwards_BT, encoder=whole) if config.encoder_layers else whole


@partial(jax.jit, static_argnums=0)
def logits(model: Model, params: Any, seen: View) -> Array:
    """Return logits_BTV; of an encoder without a head its hidden states."""
    hidden_BTD = model.apply(params, seen).hidden_BTD
    if model.config.task == "embedding":
        return hidden_BTD
    logits_NV = head_logits(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), model.head(params))
    return logits_NV.reshape(*hidden_BTD.shape[:2], -1)


def error(got_BTV: Array, wanted_BTV: Array) -> float:
    """Return the largest error of logits; a classifier's are wanted at the first token alone."""
    return float(np.abs(np.asarray(got_BTV)[:, : wanted_BTV.shape[1]] - wanted_BTV).max())


def packed_error(model: Model, params: Any, expected: Mapping[str, np.ndarray]) -> float:
    """Return the largest error of the logits of two texts in one row, and of one behind padding."""
    got = np.asarray(logits(model, params, packed(model.config, expected["tokens"])))
    return max(
        error(got[row, start : start + length][None], expected[f"piece_{number}"])
        for number, (_, length, row, start) in enumerate(PIECES)
    )


def theirs(directory: Path, config: ModelConfig) -> Any:
    """Return the model in a directory as transformers loads it."""
    auto = getattr(import_module("transformers"), AUTO_CLASSES[config.task])
    return auto.from_pretrained(directory, attn_implementation="eager").eval()


def their_logits(model: Any, tokens: Any, **masks: Any) -> Any:
    """Return what a model of transformers says to tokens (a torch tensor), as `logits` gives it."""
    if model.config.is_encoder_decoder:
        masks |= {"decoder_input_ids": tokens.flip(1)}
    output = model(tokens, **masks)
    said = output.logits if "logits" in output else output.last_hidden_state
    return said if said.ndim == 3 else said[:, None]


def export_error(model: Model, params: Any, tokens_BT: Array) -> float | None:
    """Return how far transformers' logits of the exported model are from ours; None where it is not installed."""
    if not (find_spec("torch") and find_spec("transformers")):
        return None
    torch = import_module("torch")
    moved = jax.tree.map(lambda x: x + np.float32(0.01) * np.sin(np.arange(x.size)).reshape(x.shape), params)
    with tempfile.TemporaryDirectory() as directory:
        out = export(model.config, moved, Path(directory) / "out", None)
        loaded = theirs(out, model.config)
    with torch.no_grad():
        wanted_BTV = their_logits(loaded, torch.tensor(np.asarray(tokens_BT, np.int64))).numpy()
    return error(logits(model, moved, view(model.config, tokens_BT)), wanted_BTV)


def distilled(teacher: Model, teacher_params: Any, student: Model, student_params: Any) -> tuple[float, float]:
    """Return the KL (nats a token) to the teacher before and after some steps, on random tokens not trained on."""
    recipe = Recipe(
        student,
        ObjectiveConfig(alpha=0.0),
        optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS)),
        live_teacher(teacher),
        steps=STEPS,
    )
    frozen, random = {"teacher": teacher_params}, np.random.default_rng(0)
    state = init_state(recipe, student_params)
    do, measure = (jax.jit(partial(function, recipe=recipe)) for function in (step, sums_of))
    held_out = _batch(random, teacher.config)

    def kl() -> float:
        sums = measure(state.params, frozen, held_out)
        return float(sums["kd"] / sums["kd_tokens"])

    before = kl()
    for _ in range(STEPS):
        state, _ = do(state, frozen, _batch(random, teacher.config))
    return before, kl()


def _batch(random: np.random.Generator, config: ModelConfig) -> Batch:
    """Return random texts, compared at every token; of a classifier at the first."""
    seen = view(config, random.integers(0, config.vocab_size, (ROWS, TOKENS)))
    targets_BR = np.roll(seen.tokens_BT, -1, axis=1) % (config.labels or config.vocab_size)
    weight_BR = np.ones((ROWS, TOKENS), np.float32)
    if config.labels:
        weight_BR[:, 1:] = 0
    return Batch(seen, seen.position_BT, targets_BR, weight_BR, weight_BR)


def measure(directory: Path) -> harness.Row:
    """Return the row of a model."""
    file, expected = open_model(str(directory)), np.load(directory / "expected.npz")
    teacher, params = Model(file.config), jax.tree.map(lambda tensor: tensor.all(), file.tensors)
    tokens_BT, wanted_BTV = expected["tokens"], expected["logits"]
    cut = select_layers(file, KEPT)
    row: harness.Row = {
        "what": "models",
        "model": directory.name,
        "family": file.config.family,
        "task": file.config.task,
        "import_error": error(logits(teacher, params, view(file.config, tokens_BT)), wanted_BTV),
        "packed_error": packed_error(teacher, params, expected),
        "export_error": export_error(teacher, params, tokens_BT),
    }
    if "greedy" in expected:
        greedy = generate(teacher, params, [tokens_BT[0].tolist()], max_new_tokens=len(expected["greedy"]))[0]
        row["greedy_equal"] = greedy == expected["greedy"].tolist()
    if file.config.task != "embedding":
        student = jax.tree.map(lambda tensor: tensor.all(), cut.tensors)
        row["kl_before"], row["kl_after"] = distilled(teacher, params, Model(cut.config), student)
    return row


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/models.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.models` writes the figures that stand here."

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.0e}"

    lines = ["| family | model | import | packed | export | greedy text | distilled: KL before → after |"]
    lines += ["|:--|:--|--:|--:|--:|:--|--:|"]
    for row in sorted(rows, key=lambda row: (row["family"], row["model"])):
        errors = " | ".join(shown(row[f"{name}_error"]) for name in ("import", "packed", "export"))
        text = {True: "equal", False: "differs", None: "–"}[row.get("greedy_equal")]
        kl = f"{row['kl_before']:.3f} → {row['kl_after']:.3f}" if "kl_before" in row else "–"
        lines.append(f"| `{row['family']}` | {row['model']} | {errors} | {text} | {kl} |")
    here = rows[-1]["environment"]
    names = ("python", "jax", "flax", "torch", "transformers")
    versions = ", ".join(f"{name} {here[name]}" for name in names if here.get(name))
    return "\n".join([*lines, "", f"Measured on {harness.machine(here)}; {versions}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every model, in the place of what there was; return 1 where a family of the registry has none."""
    options = harness.parser(__doc__, RESULTS).parse_args(arguments)
    environment = harness.environment() | loss_peers.versions()
    paths = sorted(GOLDEN.glob("*/config.json"))
    measured = (measure(path.parent) for path in (paths[:2] if options.quick else paths))
    rows = harness.tell_anew(options, measured, environment)
    missing = set() if options.quick else FAMILIES.keys() - {row["family"] for row in rows}
    if missing:
        print(f"no model of {', '.join(sorted(missing))}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    harness.leave(main)
