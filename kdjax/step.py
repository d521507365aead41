"""The one pure step, where signal, student, loss and optimiser meet. No input or output, no mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kdjax.errors import UserError
from kdjax.losses import (
    FEATURES,
    Feature,
    ObjectiveConfig,
    Shard,
    chunk_divergence,
    fused_kd_loss,
    log_likelihoods,
    one_device,
    said_log_probs,
    sample_weights,
    target_log_probs,
)
from kdjax.losses.features import feature_sum, init_projections, named, projection_name, tapped
from kdjax.losses.schedules import ends, value_at
from kdjax.models import Model, lora
from kdjax.shapes import AnySignal, Array, Batch, Head, Signal, in_parts
from kdjax.teacher import SignalOf, of_chunk, pick_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training changes; arrays only.

    Attributes:
        step: batches consumed, int32.
        params: named trees: `student`, what is trained of it, and the learned `projections` of losses of inner layers.
        opt_state: the optimiser's.
        skipped: updates left out because loss or gradient was not finite, int32.
        skipped_in_a_row: of these, the latest ones without a good one between, int32.
        slow: the moving average of what is trained of the student, as `student`, where that is the teacher.
    """

    step: Array
    params: dict[str, Any]
    opt_state: Any
    skipped: Array
    skipped_in_a_row: Array
    slow: dict[str, Any] = field(default_factory=dict)


FOLLOWS = {
    "nothing": None,
    "average": lambda state: state.slow["student"],
    "student": lambda state: state.params["student"],
}
"""`Recipe.teacher_follows` -> what is trained of the teacher at a state; None where it stays as it is."""


@dataclass(frozen=True)
class Recipe:
    """What a step is made of besides its arrays; everything here is static.

    Attributes:
        model: the student.
        objective: what is minimised.
        optimizer: an optax chain.
        signal_of: what the teacher says about a microbatch.
        steps: of the whole run, for schedules.
        microbatches: into how many parts a batch is split, one after the other.
        seed: of all random draws.
        shard: spreads the loss's tokens over a mesh (`Placement.shard_loss`).
        axis_name: the axis to sum over when the step runs under pmap.
        projections: name -> (student's width, teacher's width) of each learned projection.
        adapter_scale: what the student's adapters add is multiplied by this.
        teacher_follows: a row of `FOLLOWS`; training, and only that, is taught by what it gives.
        average_decay: of the moving average, a step.
        clip_ratio: how far from 1 the importance ratio of a token may go that a former student drew.
    """

    model: Model
    objective: ObjectiveConfig
    optimizer: optax.GradientTransformation
    signal_of: SignalOf
    steps: int = 1
    microbatches: int = 1
    seed: int = 0
    shard: Shard = one_device
    axis_name: str | None = None
    projections: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    adapter_scale: float = 1.0
    teacher_follows: str = "nothing"
    average_decay: float = 0.99
    clip_ratio: float = 0.2


def init_state(recipe: Recipe, student_params: Any) -> TrainState:
    """Return the state before the first step."""
    projections = init_projections(recipe.projections, jax.random.key(recipe.seed))
    params = {"student": student_params, "projections": projections}
    counts = [jnp.zeros((), jnp.int32) for _ in range(3)]  # three buffers: the step donates each
    slow = {"student": jax.tree.map(jnp.copy, student_params)} if recipe.teacher_follows == "average" else {}
    return TrainState(counts[0], params, recipe.optimizer.init(params), counts[1], counts[2], slow)


def taught_by(recipe: Recipe, state: TrainState, frozen: Any) -> Any:
    """Return the frozen trees with the teacher that a state has: the frozen one, or one that follows the student."""
    of = FOLLOWS[recipe.teacher_follows]
    if of is None:
        return frozen
    whole = lora.assembled(frozen.get("student", {}), of(state), recipe.adapter_scale)
    return frozen | {"teacher": lax.stop_gradient(whole)}


def student_params(recipe: Recipe, params: Any, frozen: Any) -> Any:
    """Return all parameters of the student: those that are trained, and the frozen ones where there are some."""
    return lora.assembled(frozen.get("student", {}), params["student"], recipe.adapter_scale)


def loss_sums(
    recipe: Recipe,
    params: Any,
    frozen: Any,
    batch: Batch,
    row_keys_B: Array | None = None,
    progress: Array | float = 1.0,
    token_weight: Array | float = 1.0,
) -> tuple[Array, dict[str, Array]]:
    """Return the loss of a batch whose weights are used as they are, and its parts: sums, never means.

    `token_weight` is that of each real token where a loss goes by tokens and not by compared rows: those of some inner
    layers, and the load balance, which is of the batch as it is given here and counts by its real tokens.
    """
    features = recipe.objective.features
    how = {"taps": tuple(tapped(features, 0)), "row_keys_B": row_keys_B, "prefix": frozen.get("student_prefix")}
    with jax.named_scope("student"):
        student = student_params(recipe, params, frozen)
        output = recipe.model.apply(student, batch.student, **how)
    with jax.named_scope("teacher"):
        signal = recipe.signal_of(frozen, batch)
    with jax.named_scope("loss"):
        return _loss_of(recipe, params, student, output, signal, batch, progress, token_weight)


def _loss_of(
    recipe: Recipe,
    params: Any,
    student: Any,
    output: Any,
    signal: AnySignal | None,
    batch: Batch,
    progress: Array | float,
    token_weight: Array | float,
) -> tuple[Array, dict[str, Array]]:
    """Return the loss and its parts, of what both models say."""
    features, loss, parts = recipe.objective.features, jnp.zeros(()), {}
    if recipe.objective.logits and recipe.objective.of_chunks:
        loss, parts = _of_chunks(recipe, student, output, signal, batch, progress)
    elif recipe.objective.logits:
        hidden_ND, head = pick_rows(output.hidden_BTD, batch.student_rows_BR), recipe.model.head(student)
        loss, parts = fused_kd_loss(
            hidden_ND,
            head,
            signal,
            batch.targets_BR.reshape(-1),
            batch.ce_weight_BR.reshape(-1),
            batch.kd_weight_BR.reshape(-1),
            recipe.objective,
            token_weights=_of_samples(recipe, hidden_ND, head, signal, batch),
            progress=progress,
            shard=recipe.shard,
        )
    if _balances(recipe):
        balance = output.aux["load_balance"] * jnp.sum(batch.student.segment_BT > 0) * token_weight
        loss, parts = loss + recipe.objective.load_balance * balance, parts | {"load_balance": balance}
    if not features:
        return loss, parts
    sums = feature_sums(recipe, params, batch, output.taps, signal, token_weight)
    return loss + sum(feature.weight * sums[name] for name, feature in named(features).items()), parts | sums


def _of_chunks(
    recipe: Recipe, student: Any, output: Any, signal: Any, batch: Batch, progress: Array | float
) -> tuple[Array, dict[str, Array]]:
    """Return the loss and parts where the teacher has another tokenizer, and chunks of text are compared."""
    hidden_ND, head = pick_rows(output.hidden_BTD, batch.student_rows_BR), recipe.model.head(student)
    targets_N, spans, kd_weight_BR = batch.targets_BR.reshape(-1), batch.spans, batch.kd_weight_BR
    weights = batch.ce_weight_BR.reshape(-1), jnp.zeros(len(targets_N))
    how: Any = {"progress": progress, "shard": recipe.shard}
    loss, parts = fused_kd_loss(hidden_ND, head, None, targets_N, *weights, recipe.objective, **how)
    if signal is None or spans is None:
        return loss, parts
    log_q_N: Array = log_likelihoods(hidden_ND, head, targets_N, recipe.objective, recipe.shard)
    ours_BR = of_chunk(log_q_N.reshape(batch.targets_BR.shape), spans.chunk_BR, spans.chunk_BR)
    kd = jnp.zeros(())
    for term in recipe.objective.all_terms:
        distance_BR = chunk_divergence(ours_BR, signal.chunks_BR, **dict(term.chosen.parameters))
        kd = kd + value_at(term.weight, progress) * jnp.sum(kd_weight_BR * distance_BR)
    alpha = value_at(recipe.objective.alpha, progress)
    # A constant 0 leaves out the cross entropy: 0·gradient would be computed.
    loss = kd if isinstance(alpha, float) and alpha == 0 else alpha * loss + (1 - alpha) * kd
    return loss, parts | {"kd": lax.stop_gradient(kd)}


def _of_samples(recipe: Recipe, hidden_ND: Array, head: Head, signal: Any, batch: Batch) -> dict[str, Array]:
    """Return the token weights that come from how likely targets are, where a term asks for such."""
    asked = [term for term in recipe.objective.all_terms if term.weighed_by_samples]
    names = {name for term in asked for name in (term.token_weight, term.chosen.name)}
    if not asked or (batch.drawn is None and names == {"", "sampled_reverse_kl"}):
        return {}
    temperature, shape = ends(asked[0].temperature, "temperature")[0], batch.targets_BR.shape
    how: Any = {"temperature": temperature, "shard": recipe.shard}
    targets_N = batch.targets_BR.reshape(-1)
    both = (
        target_log_probs(hidden_ND, head, targets_N, recipe.objective, **how),
        said_log_probs(signal, targets_N, recipe.objective, **how),
    )
    segment_BR = jnp.take_along_axis(batch.student.segment_BT, batch.student_rows_BR, axis=1)
    given: Any = (*(x_N.reshape(shape) for x_N in both), batch.kd_weight_BR, segment_BR, batch.drawn, recipe.clip_ratio)
    return {name: x_BR.reshape(-1) for name, x_BR in sample_weights(*given).items() if name in names}


def likely(
    params: Any, frozen: Any, batch: Batch, recipe: Recipe, temperature: float, teacher_share: float
) -> tuple[Array, Array]:
    """Return the log-probabilities of a batch's targets, [B, R]: of the student, and of its mixture with a teacher.

    Args:
        params: of a state.
        frozen: the trees that are not trained.
        batch: all of it; one microbatch after the other is looked at.
        recipe: of the step.
        temperature: that logits of both are divided by.
        teacher_share: of the teacher in the mixture.
    """
    student = student_params(recipe, params, frozen)

    def of_some(batch: Batch) -> tuple[Array, Array]:
        output = recipe.model.apply(student, batch.student, prefix=frozen.get("student_prefix"))
        hidden_ND, head = pick_rows(output.hidden_BTD, batch.student_rows_BR), recipe.model.head(student)
        how: Any = {"temperature": temperature, "shard": recipe.shard}
        given = batch.targets_BR.reshape(-1), recipe.objective
        log_q_N = mixed_N = target_log_probs(hidden_ND, head, *given, **how)
        if teacher_share:  # otherwise it has no part in what was drawn, and is not run
            log_p_N = said_log_probs(recipe.signal_of(frozen, batch), *given, **how)
            mixed_N = jnp.logaddexp(log_q_N + math.log1p(-teacher_share), log_p_N + math.log(teacher_share))
        return log_q_N.reshape(batch.targets_BR.shape), mixed_N.reshape(batch.targets_BR.shape)

    found = lax.map(of_some, jax.tree.map(lambda x: in_parts(x, recipe.microbatches), batch))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)


def feature_sums(
    recipe: Recipe, params: Any, batch: Batch, student_taps: Any, signal: Any, token_weight: Any
) -> dict[str, Array]:
    """Return Σ weight·loss of each loss of inner layers, by name; each is the mean over its pairs of layers."""
    features = recipe.objective.features
    order = tapped(features, 1)
    if not isinstance(signal, Signal) or not signal.taps.keys() >= order.keys():
        raise UserError("objective.features compares inner layers, but the teacher's signal has none; run it live")
    rows = batch.student_rows_BR, batch.student_rows_BR if batch.teacher_rows_BR is None else batch.teacher_rows_BR
    kd_weight_N, real_BT = batch.kd_weight_BR.reshape(-1), batch.student.segment_BT > 0

    def of_pair(feature: Feature, pair: tuple[int, int]) -> Array:
        tap, by_rows = FEATURES[feature.kind].tap, FEATURES[feature.kind].by_rows
        student, teacher = student_taps[tap][pair[0]], signal.taps[tap][order[tap].index(pair[1])]
        if by_rows:
            kernel_DD = params["projections"].get(projection_name(feature, pair), {}).get("kernel")
            student_ND, teacher_ND = pick_rows(student, rows[0]), pick_rows(teacher, rows[1])
            return feature_sum(feature, student_ND, teacher_ND, kd_weight_N != 0, kd_weight_N, kernel_DD)
        if batch.teacher is not None:
            raise UserError(
                f"objective.features {feature.kind!r} wants one view of a batch, but the teacher has its own"
            )
        student_BTD, teacher_BTD = (x.reshape(*real_BT.shape, -1) for x in (student, teacher))
        return feature_sum(feature, student_BTD, teacher_BTD, batch.student.segment_BT, real_BT * token_weight)

    return {
        name: sum(of_pair(feature, pair) for pair in feature.layers) / len(feature.layers)
        for name, feature in named(features).items()
    }


def step(state: TrainState, frozen: Any, batch: Batch, recipe: Recipe) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after one batch, and what to log.

    The denominators are data: each part's weight over the whole batch is known before the first microbatch, so that
    microbatches, devices and packed rows only add up. A loss or gradient that is not finite changes no parameter.
    """
    gradients, metrics = gradient(recipe, state, taught_by(recipe, state, frozen), batch)
    with jax.named_scope("optimizer"):
        return _updated(state, recipe, gradients, metrics)


def _updated(
    state: TrainState, recipe: Recipe, gradients: Any, metrics: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after an update, or with none where loss or gradient is not finite, and what to log."""
    norm = optax.global_norm(gradients)
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    params: Any = optax.apply_updates(state.params, updates)
    slow = optax.incremental_update({name: params[name] for name in state.slow}, state.slow, 1 - recipe.average_decay)
    params, opt_state, slow = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, opt_state, slow),
        (state.params, state.opt_state, state.slow),
    )
    bad = jnp.where(good, 0, 1)
    in_a_row = bad * (state.skipped_in_a_row + 1)
    metrics |= {"grad_norm": norm, "skipped": state.skipped + bad, "skipped_in_a_row": in_a_row}
    return TrainState(state.step + 1, params, opt_state, metrics["skipped"], in_a_row, slow), metrics


def gradient(recipe: Recipe, state: TrainState, frozen: Any, batch: Batch) -> tuple[Any, dict[str, Array]]:
    """Return the gradient of the loss over the whole batch, summed over microbatches and devices, and the parts."""

    def total(x: Array) -> Array:
        return x if recipe.axis_name is None else lax.psum(x, recipe.axis_name)

    batch, weights = normalised(batch, total)
    if _balances(recipe) or any(not FEATURES[feature.kind].by_rows for feature in recipe.objective.features):
        weights["real_tokens"] = total(jnp.sum(batch.student.segment_BT > 0).astype(jnp.float32))
    token_weight = 1 / jnp.maximum(weights.get("real_tokens", 1.0), 1.0)
    row_keys_B = _row_keys(recipe, state.step, batch.targets_BR.shape[0])
    microbatches = jax.tree.map(lambda x: in_parts(x, recipe.microbatches), (batch, row_keys_B))
    progress = jnp.clip(state.step / max(recipe.steps - 1, 1), 0, 1)  # 0 at the first step, 1 at the last
    differentiate = jax.value_and_grad(
        lambda params, micro, keys_B: loss_sums(recipe, params, frozen, micro, keys_B, progress, token_weight),
        has_aux=True,
    )

    def add(sums, micro):
        (loss, parts), gradients = differentiate(state.params, *micro)
        return jax.tree.map(jnp.add, sums, (gradients, parts | {"loss": loss})), None

    first = jax.tree.map(lambda x: x[0], microbatches)
    (loss, parts), gradients = jax.eval_shape(differentiate, state.params, *first)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradients, parts | {"loss": loss}))
    (gradients, metrics), _ = lax.scan(add, start, microbatches)
    return jax.tree.map(total, gradients), jax.tree.map(total, metrics) | weights


def _balances(recipe: Recipe) -> bool:
    return bool(recipe.model.config.experts and recipe.objective.load_balance)


def normalised(batch: Batch, total: Callable[[Array], Array]) -> tuple[Batch, dict[str, Array]]:
    """Return the batch with each weight divided by its sum over the whole batch, and these sums."""
    sums = {"ce_tokens": total(jnp.sum(batch.ce_weight_BR)), "kd_tokens": total(jnp.sum(batch.kd_weight_BR))}

    def divided(weight_BR: Array, by: Array) -> Array:
        return weight_BR / jnp.where(by > 0, by, 1.0)

    ce_BR, kd_BR = divided(batch.ce_weight_BR, sums["ce_tokens"]), divided(batch.kd_weight_BR, sums["kd_tokens"])
    return replace(batch, ce_weight_BR=ce_BR, kd_weight_BR=kd_BR), sums


def _row_keys(recipe: Recipe, step: Array, rows: int) -> Array | None:
    """Return a key for each row, from seed, step and global row: the same under any placement (None: no dropout)."""
    if not recipe.model.config.dropout:
        return None
    first = 0 if recipe.axis_name is None else lax.axis_index(recipe.axis_name) * rows
    key = jax.random.fold_in(jax.random.key(recipe.seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))
