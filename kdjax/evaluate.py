"""Sums over a held-out split: cross entropy of both models, divergence to the teacher, agreement."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.losses import LOGGED, ObjectiveConfig
from kdjax.metrics import means
from kdjax.models import Model
from kdjax.shapes import Array, Batch, View
from kdjax.step import Recipe, loss_sums


def sums_of(params: Any, frozen: Any, batch: Batch, recipe: Recipe) -> dict[str, Array]:
    """Return a batch's summed cross entropies (nats), KL(teacher ‖ student) at temperature 1, agreements and tokens.

    Where the objective leaves logits out, its features' weighted sum is all there is.
    """
    if recipe.objective.logits:
        chunks = {name: getattr(recipe.objective, name) for name in ("chunk_tokens", "chunk_mib", "implementation")}
        recipe = replace(recipe, objective=ObjectiveConfig(alpha=0.0, **chunks))
    loss, parts = loss_sums(recipe, params, frozen, batch)
    sums = parts if recipe.objective.logits else {"features": loss}
    sums = sums | {"ce_tokens": jnp.sum(batch.ce_weight_BR), "kd_tokens": jnp.sum(batch.kd_weight_BR)}
    if recipe.axis_name is None:
        return sums
    return jax.tree.map(lambda x: lax.psum(x, recipe.axis_name), sums)


def evaluate(sums_of: Callable[[Any], dict[str, Array]], batches: Iterable[Any]) -> dict[str, float]:
    """Return figures of a whole split, each a sum over all tokens divided once.

    Args:
        sums_of: the placed `sums_of` of one batch.
        batches: the split, on the mesh, as `sums_of` takes it.

    Returns:
        `ce`, `perplexity` = exp(summed CE / tokens), `tokens`, `seconds`; with a teacher also `kl` (nats a token),
        `agreement`, both models' mean confidence (probability of the likeliest token) and entropy (nats), `teacher_ce`
        and `teacher_perplexity`, without those of them that a top-k does not tell. Without logits `features`, the
        objective's sum over features a token, instead.
    """
    began, sums = time.perf_counter(), Counter()
    for batch in batches:
        sums.update({name: float(value) for name, value in sums_of(batch).items()})
    tokens, pairs = sums["ce_tokens"], {"ce": (sums["ce"], sums["ce_tokens"])} if "ce" in sums else {}
    if "features" in sums:
        pairs["features"] = (sums["features"], sums["kd_tokens"])
    if "kd" in sums:
        pairs |= {"kl": (sums["kd"], sums["kd_tokens"])}
        pairs |= {name: (sums[name], sums["kd_tokens"]) for name in LOGGED if name in sums}
        pairs |= {"teacher_ce": (sums["teacher_ce"], sums["ce_tokens"])} if "teacher_ce" in sums else {}
    return means(pairs) | {"tokens": tokens, "seconds": time.perf_counter() - began}


def forward_speed(model: Model, params: Any, view: View, repeats: int = 3) -> float:
    """Return tokens a second of the model's forward pass (hidden states, no head), the best of some repeats."""
    forward = jax.jit(lambda params, view: jnp.sum(model.apply(params, view).hidden_BTD.astype(jnp.float32)))
    forward(params, view).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        forward(params, view).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return view.tokens_BT.size / best
