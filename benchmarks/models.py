"""What each family of models can do here: read, export, generate and distil, each measured on a tiny random model.

COMMAND: python -m benchmarks.models          (a few minutes on 2 CPU cores; with torch and transformers also exports)

The models, and what transformers makes of them, are those of tests/golden. Rows are written to
benchmarks/results/models.jsonl, anew each time; `python -m benchmarks.readme` puts them into docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import harness, peers
from kdjax.evaluate import sums_of
from kdjax.generate import generate
from kdjax.losses import ObjectiveConfig, head_logits
from kdjax.models import Model, export, open_model, select_layers
from kdjax.models.registry import FAMILIES
from kdjax.shapes import Array, Batch, View
from kdjax.step import Recipe, init_state, step
from kdjax.teacher import live_teacher

GOLDEN = harness.ROOT / "tests" / "golden"
RESULTS = harness.RESULTS / "models.jsonl"
STEPS, ROWS, TOKENS = 100, 16, 16
KEPT = (0, 2)
"""The teacher's layers, of three, that the student is made of."""


def view(tokens_BT: Array) -> View:
    """Return tokens, a text a row, as a model sees them."""
    tokens_BT = np.asarray(tokens_BT, np.int32)
    position_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32)[None], tokens_BT.shape)
    return View(tokens_BT, np.ones_like(tokens_BT), position_BT)


@partial(jax.jit, static_argnums=0)
def logits(model: Model, params: Any, seen: View) -> Array:
    """Return logits_BTV."""
    hidden_BTD = model.apply(params, seen).hidden_BTD
    logits_NV = head_logits(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), model.head(params))
    return logits_NV.reshape(*hidden_BTD.shape[:2], -1)


def packed_error(model: Model, params: Any, tokens_BT: Array, wanted_BTV: Array) -> float:
    """Return the largest error of the logits of two texts in one row, and of one behind padding."""
    (first, second), (a, b) = np.asarray(tokens_BT, np.int32), wanted_BTV
    seen = View(
        np.array([[*first[:5], *second[:7]], [7, 7, 7, 7, *second[:8]]]),
        np.array([[1] * 5 + [2] * 7, [0] * 4 + [1] * 8]),
        np.array([[*range(5), *range(7)], [0] * 4 + [*range(8)]]),
    )
    got = np.asarray(logits(model, params, seen))
    pairs = (got[0, :5], a[:5]), (got[0, 5:], b[:7]), (got[1, 4:], b[:8])
    return max(float(np.abs(x - y).max()) for x, y in pairs)


def export_error(model: Model, params: Any, tokens_BT: Array) -> float | None:
    """Return how far transformers' logits of the exported model are from ours; None where it is not installed."""
    if not (find_spec("torch") and find_spec("transformers")):
        return None
    torch, transformers = import_module("torch"), import_module("transformers")
    moved = jax.tree.map(lambda x: x + np.float32(0.01) * np.sin(np.arange(x.size)).reshape(x.shape), params)
    with tempfile.TemporaryDirectory() as directory:
        out = export(model.config, moved, Path(directory) / "out", None)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted_BTV = theirs(torch.tensor(np.asarray(tokens_BT, np.int64))).logits.numpy()
    return float(np.abs(np.asarray(logits(model, moved, view(tokens_BT))) - wanted_BTV).max())


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
    held_out = _batch(random, teacher.config.vocab_size)

    def kl() -> float:
        sums = measure(state.params, frozen, held_out)
        return float(sums["kd"] / sums["kd_tokens"])

    before = kl()
    for _ in range(STEPS):
        state, _ = do(state, frozen, _batch(random, teacher.config.vocab_size))
    return before, kl()


def _batch(random: np.random.Generator, vocab_size: int) -> Batch:
    seen = view(random.integers(0, vocab_size, (ROWS, TOKENS)))
    targets_BR = np.roll(seen.tokens_BT, -1, axis=1)
    weight_BR = np.ones((ROWS, TOKENS), np.float32)
    return Batch(seen, seen.position_BT, targets_BR, weight_BR, weight_BR)


def measure(directory: Path) -> harness.Row:
    """Return the row of a model."""
    file, expected = open_model(str(directory)), np.load(directory / "expected.npz")
    teacher, params = Model(file.config), jax.tree.map(lambda tensor: tensor.all(), file.tensors)
    tokens_BT, wanted_BTV = expected["tokens"], expected["logits"]
    cut = select_layers(file, KEPT)
    greedy = generate(teacher, params, [tokens_BT[0].tolist()], max_new_tokens=len(expected["greedy"]))[0]
    before, after = distilled(
        teacher, params, Model(cut.config), jax.tree.map(lambda tensor: tensor.all(), cut.tensors)
    )
    return {
        "what": "models",
        "model": directory.name,
        "family": file.config.family,
        "import_error": float(np.abs(np.asarray(logits(teacher, params, view(tokens_BT))) - wanted_BTV).max()),
        "packed_error": packed_error(teacher, params, tokens_BT, wanted_BTV),
        "export_error": export_error(teacher, params, tokens_BT),
        "greedy_equal": greedy == expected["greedy"].tolist(),
        "kl_before": before,
        "kl_after": after,
    }


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/models.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.models` writes the figures that stand here."

    def error(value: float | None) -> str:
        return "–" if value is None else f"{value:.0e}"

    lines = ["| family | model | import | packed | export | greedy text | distilled: KL before → after |"]
    lines += ["|:--|:--|--:|--:|--:|:--|--:|"]
    for row in rows:
        errors = " | ".join(error(row[f"{name}_error"]) for name in ("import", "packed", "export"))
        text = "equal" if row["greedy_equal"] else "differs"
        kl = f"{row['kl_before']:.3f} → {row['kl_after']:.3f}"
        lines.append(f"| `{row['family']}` | {row['model']} | {errors} | {text} | {kl} |")
    here = rows[-1]["environment"]
    names = ("python", "jax", "flax", "torch", "transformers")
    versions = ", ".join(f"{name} {here[name]}" for name in names if here.get(name))
    return "\n".join([*lines, "", f"Measured on {here['device']} ({here['platform']}); {versions}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every model; return 1 where a family of the registry has none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH")
    options = parser.parse_args(arguments)
    environment, rows = harness.environment() | peers.versions(), []
    for path in sorted(GOLDEN.glob("*/config.json")):
        rows.append(measure(path.parent) | {"environment": environment})
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "environment"}), flush=True)
    missing = FAMILIES.keys() - {row["family"] for row in rows}
    options.results.unlink(missing_ok=True)
    harness.append(options.results, sorted(rows, key=lambda row: (row["family"], row["model"])))
    print(f"no model of {', '.join(sorted(missing))}" if missing else "every family has a model", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
