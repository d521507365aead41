"""The quickstart's figures: distillation, the same student on cross entropy alone, and a unigram model.

COMMAND: python -m benchmarks.quickstart --seeds 5     (about 9 minutes a seed on 2 CPU cores; run again to go on)

Appends one JSON object a run to benchmarks/results/quickstart.jsonl; the README's table is made from it. The seed is
that of the order of the data: the held-out text is the same for all.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import harness, quick
from kdjax import config as configs
from kdjax.build import build
from kdjax.config import Config
from kdjax.job import Job
from kdjax.losses import ObjectiveConfig, fused_kd_loss
from kdjax.metrics import means
from kdjax.shapes import Array, Batch, Head
from kdjax.train import train

RESULTS = harness.RESULTS / "quickstart.jsonl"
RECIPE = harness.ROOT / "configs" / "quickstart.py"
FIGURES = (
    *("kl_before", "kl_after", "perplexity_teacher", "perplexity_before", "perplexity_after"),
    *("agreement_before", "agreement_after", "parameters_teacher", "parameters_student"),
    *("tokens_per_second_train", "tokens_per_second_teacher", "tokens_per_second_student", "seconds"),
    *("steps", "train_tokens", "eval_tokens", "held_out_sha256"),
)

ALPHA = {"distilled": 0.0, "cross_entropy": 1.0}
"""The objective's weight of the cross entropy; all else is the recipe's. The teacher still measures both."""


def trained(recipe: Config, objective: str, seed: int) -> dict[str, Any]:
    """Return the figures of one run of the recipe."""
    config = replace(
        recipe,
        objective=replace(recipe.objective, alpha=ALPHA[objective]),
        data=replace(recipe.data, seed=seed),
        prompt="",
    )
    with tempfile.TemporaryDirectory() as directory:
        summary = train(config, Path(directory) / "run")
    return {name: summary.get(name) for name in FIGURES}


def unigram(recipe: Config, seed: int) -> dict[str, Any]:
    """Return the figures of the tokens' frequencies in as much training text as a run reads, add-one smoothed.

    Frequencies are the bias of a head whose matrix is 0, so the same loss measures them.
    """
    job = build(replace(recipe, data=replace(recipe.data, seed=seed)))
    bias_V = _log_frequencies(job, recipe.steps)
    frozen, sums = job.frozen(), Counter()
    for batch in job.data.evaluation(recipe.batch_size):
        batch = job.place.put_batch(batch)
        sums.update({name: float(value) for name, value in _sums(job, frozen, batch, bias_V).items()})
    figures = means({name: (sums[name], sums["tokens"]) for name in ("ce", "kd", "agreement")})
    return {
        "kl_after": figures["kd"],
        "perplexity_after": figures["perplexity"],
        "agreement_after": figures["agreement"],
        "steps": recipe.steps,
        "eval_tokens": sums["tokens"],
        "held_out_sha256": job.data.held_out_hash,
    }


def _log_frequencies(job: Job, steps: int) -> Array:
    counts, batches = np.ones(job.student.model.config.vocab_size), job.data.train()
    for _ in range(steps):
        batch, _ = next(batches)
        np.add.at(counts, batch.targets_BR[batch.ce_weight_BR > 0], 1)
    return jnp.log(jnp.asarray(counts / counts.sum(), jnp.float32))


def _sums(job: Job, frozen: Any, batch: Batch, bias_V: Array) -> dict[str, Array]:
    signal = job.recipe.signal_of(frozen, batch)
    head = Head(jnp.zeros((1, bias_V.size)), bias_V, vocab_size=bias_V.size)
    weight_N = batch.ce_weight_BR.reshape(-1)
    nothing_N1 = jnp.zeros((weight_N.size, 1))
    objective = ObjectiveConfig(alpha=0.0, chunk_tokens=job.config.objective.chunk_tokens)
    _, parts = fused_kd_loss(nothing_N1, head, signal, batch.targets_BR.reshape(-1), weight_N, weight_N, objective)
    return parts | {"tokens": jnp.sum(weight_N)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    recipe, environment = configs.load(str(RECIPE)), harness.environment()
    done = {(row["objective"], row["seed"]) for row in harness.kept(options)}
    with tempfile.TemporaryDirectory() as directory:
        recipe = quick.recipe(recipe, Path(directory)) if options.quick else recipe
        for seed in range(options.seeds):
            for objective in [name for name in (*ALPHA, "unigram") if (name, seed) not in done]:
                figures = unigram(recipe, seed) if objective == "unigram" else trained(recipe, objective, seed)
                row = {"what": "quickstart", "objective": objective, "seed": seed} | figures
                harness.tell(options, row, environment)
    return 0


if __name__ == "__main__":
    harness.leave(main)
