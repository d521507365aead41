"""Cross entropy and divergence to the teacher from hidden states and heads; logits exist for one chunk at a time.

The gradient is computed in the forward pass, chunk by chunk, by `jax.vjp` on the chunk's [C, V] logits: the residuals
are the gradients themselves, and evaluation pays nothing for them. Tokens of weight 0 are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError
from kdjax.losses.chunk import Dense, Hidden, Tokens, check_terms, chunk_loss
from kdjax.losses.logits import finish, head_logits, matmul, vocabulary
from kdjax.losses.objective import ObjectiveConfig
from kdjax.shapes import AnySignal, Array, Axes, Head, Mixture, Sampled, Signal, TopK, check_shapes

MIB = {"cpu": 1024, "other": 4096}
"""Memory that one chunk's logits may take unless objective.chunk_mib says otherwise."""

COPIES = 8
"""Arrays of a chunk's logits that exist at one time, at most: 5 of the forward KL, 8 of the JSD, as XLA counts them on
a CPU."""


class Heads(NamedTuple):
    """What all tokens share: every leaf ends in V."""

    student: Head
    teachers: tuple[Head, ...]


Local = Callable[[Axes, Tokens, Heads, Array], Any]
Shard = Callable[[Local, Tokens, Heads, Array], Any]
"""Runs `local` on each device's own tokens; `kdjax.sharding` has the one for a mesh."""


def one_device(local: Local, tokens: Tokens, heads: Heads, progress: Array) -> Any:
    """Return ``local`` of all tokens: nothing is shared out."""
    return local(Axes(), tokens, heads, progress)


def chunk_size(objective: ObjectiveConfig, n: int, columns: int, backend: str | None = None) -> int:
    """Return how many of n tokens make a chunk: as set, or a multiple of 64 whose logits fit the memory budget.

    Where it can, auto makes at least 8 chunks, none below 256 tokens, so that skipping those without weight pays.

    Args:
        objective: with `chunk_tokens` and `chunk_mib`.
        n: tokens of a device.
        columns: of the vocabulary that the device holds.
        backend: as jax names it; by default the one in use.
    """
    if objective.chunk_tokens != "auto":
        return max(1, min(objective.chunk_tokens, n))
    mib = objective.chunk_mib or MIB.get(backend or jax.default_backend(), MIB["other"])
    fits = mib * 2**20 // (4 * columns * COPIES)
    tokens = min(fits, max(256, n // 8))
    return max(1, min(max(64, tokens // 64 * 64), n))


def _teacher_of(axes: Axes, heads: Heads, teacher: Any) -> Any:
    """Return what `chunk_loss` compares with: all teachers' logits, or the sparse signal as it is."""
    if not isinstance(teacher, Hidden):
        return teacher
    pairs = zip(teacher.states, heads.teachers, strict=True)
    return Dense(tuple(head_logits(hidden_ND, head, axes) for hidden_ND, head in pairs), teacher.weights_NK)


def _chunk(objective: ObjectiveConfig, axes: Axes, heads: Heads, with_gradients: bool, tokens: Tokens, progress: Array):
    """Return the loss and parts of one chunk, and float32 gradients (dh_CD, dw_DV, dbias_V) if asked for."""
    head, bias_V = heads.student, heads.student.bias_V
    over, teacher = vocabulary(head, axes), _teacher_of(axes, heads, tokens.teacher)

    def of_raw(raw_CV: Array, bias_V: Array | None):
        return chunk_loss(objective, over, tokens, progress, finish(raw_CV, bias_V, head, axes), teacher)

    raw_CV = matmul(tokens.student_ND, head)
    if not with_gradients:
        return of_raw(raw_CV, bias_V), None
    loss, pullback, parts = jax.vjp(of_raw, raw_CV, bias_V, has_aux=True)
    # Every device of the tensor axis holds a copy of the loss, and psum's pullback adds up what all copies send.
    d_raw_CV, d_bias_V = pullback(jnp.float32(1 / over.parts))
    # Cast once, before both matmuls, which accumulate in float32: bf16 gradients then err by 0.2 to 0.3 %.
    d_raw_CV, w_DV = d_raw_CV.astype(tokens.student_ND.dtype), head.w_DV.astype(tokens.student_ND.dtype)
    dh_CD = jnp.einsum("cv,dv->cd", d_raw_CV, w_DV, preferred_element_type=jnp.float32)
    dw_DV = jnp.einsum("cd,cv->dv", tokens.student_ND, d_raw_CV, preferred_element_type=jnp.float32)
    return (loss, parts), (dh_CD, dw_DV, d_bias_V)


def _chunked(
    objective: ObjectiveConfig, with_gradients: bool, axes: Axes, tokens: Tokens, heads: Heads, progress: Array
):
    """Return (loss, parts) summed over all tokens of the mesh, and the gradients of this device's share or None.

    Tokens that weigh something come first; chunks without any are skipped. The others' rows are never read.
    """
    n = tokens.targets_N.shape[0]
    chunk = chunk_size(objective, n, heads.student.w_DV.shape[1])
    chunks = -(-n // chunk)
    weighs_N = (tokens.ce_weight_N != 0) | (tokens.kd_weight_N != 0)
    live = jnp.sum(weighs_N)
    order_N = jnp.where(jnp.arange(n) < live, jnp.argsort(~weighs_N, stable=True), n)
    order = jnp.pad(order_N, (0, chunks * chunk - n), constant_values=n)

    def take(rows_C: Array) -> Tokens:
        return jax.tree.map(lambda x: jnp.take(x, rows_C, axis=0, mode="fill", fill_value=0), tokens)

    def add(totals, rows_C: Array):
        sums, gradients = _chunk(objective, axes, heads, with_gradients, take(rows_C), progress)
        return jax.tree.map(jnp.add, totals, (sums, gradients and gradients[1:])), gradients and gradients[0]

    def body(totals, rows_C: Array):
        # All devices of the tensor axis hold the same tokens, so they go the same way.
        return lax.cond(rows_C[0] < n, add, lambda totals, rows_C: (totals, nothing), totals, rows_C)

    sums, gradients = jax.eval_shape(
        lambda rows_C: _chunk(objective, axes, heads, with_gradients, take(rows_C), progress), order[:chunk]
    )
    start = _zeros((sums, gradients and gradients[1:]))
    nothing = gradients and _zeros(gradients[0])
    (sums, head_gradients), dh = lax.scan(body, start, order.reshape(chunks, chunk))
    sums, head_gradients = lax.psum((sums, head_gradients), axes.batch) if axes.batch else (sums, head_gradients)
    if not with_gradients:
        return sums, None, None
    dh = dh.reshape(chunks * chunk, -1).astype(tokens.student_ND.dtype if axes.tensor is None else jnp.float32)
    dh_ND = jnp.zeros((n, dh.shape[1]), dh.dtype).at[order].set(dh, mode="drop")
    dh_ND = dh_ND if axes.tensor is None else lax.psum(dh_ND, axes.tensor)
    return sums, dh_ND.astype(tokens.student_ND.dtype), head_gradients


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(objective: ObjectiveConfig, shard: Shard, trained: tuple[Array, Head], given: tuple):
    tokens, heads, progress = _put(trained, given)
    sums, _, _ = shard(partial(_chunked, objective, False), tokens, heads, progress)
    return sums


def _in_chunks_forward(objective, shard, trained, given):
    tokens, heads, progress = _put(trained, given)
    sums, dh_ND, (dw_DV, d_bias_V) = shard(partial(_chunked, objective, True), tokens, heads, progress)
    head = trained[1]
    return sums, (dh_ND, replace(head, w_DV=dw_DV.astype(head.w_DV.dtype), bias_V=d_bias_V))


def _in_chunks_backward(objective, shard, gradients, cotangents):
    of_loss, _ = cotangents
    return jax.tree.map(lambda x: (x * of_loss).astype(x.dtype), gradients), None


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _put(trained: tuple[Array, Head], given: tuple) -> tuple[Tokens, Heads, Array]:
    (hidden_ND, head), (rest, teachers, progress) = trained, given
    return Tokens(hidden_ND, *rest), Heads(head, teachers), progress


def _reference(objective: ObjectiveConfig, shard: Shard, trained: tuple[Array, Head], given: tuple):
    """Return the loss and parts from the logits of all tokens at once, differentiated by jax."""
    tokens, heads, progress = _put(trained, given)
    student_NV, teacher = head_logits(tokens.student_ND, heads.student), _teacher_of(Axes(), heads, tokens.teacher)
    loss, parts = chunk_loss(objective, vocabulary(heads.student), tokens, progress, student_NV, teacher)
    return loss, lax.stop_gradient(parts)


IMPLEMENTATIONS = {"chunked": _in_chunks, "reference": _reference}
"""Ways to the same numbers. Each is ``f(objective, shard, (student_hidden_ND, student_head), given)``."""


def fused_kd_loss(
    student_hidden_ND: Array,
    student_head: Head,
    signal: AnySignal | None,
    targets_N: Array,
    ce_weight_N: Array,
    kd_weight_N: Array,
    objective: ObjectiveConfig,
    *,
    token_weights: dict[str, Array] | None = None,
    progress: Array | float = 0.0,
    shard: Shard = one_device,
) -> tuple[Array, dict[str, Array]]:
    """Return the summed loss Σ α·w_ce·CE + (1 − α)·Σ_i w_i·w_kd·f_i(T_i)·D_i and its parts, never all logits at once.

    Differentiable in `student_hidden_ND` and the student head's matrix and bias; the signal, targets and weights get
    no gradient, and nor do the parts. Arithmetic on logits is float32 whatever the inputs are. Peak temporary memory
    is O(chunk_tokens·V). Tokens of weight 0 cost nothing and may hold anything, NaN too
    (but for the implementation `reference`, which looks at them).

    Args:
        student_hidden_ND: hidden states at the compared rows, in the compute dtype.
        student_head: in its stored dtype, cast inside.
        signal: what the teacher says (its hidden states and head, a mixture of such, or a sparse signal), or None for
            the cross entropy alone.
        targets_N: next tokens, int32.
        ce_weight_N: divided by the global weight already, so that losses of microbatches and devices add up.
        kd_weight_N: likewise; the two totals may differ.
        objective: terms, weights, temperatures, chunk size.
        token_weights: arrays_N by name, for terms whose `token_weight` names one.
        progress: share of the run that is done, 0 to 1, for schedules.
        shard: spreads tokens over a mesh; then weights are global and the result is the sum over all devices.

    Returns:
        The loss, and weighted sums: `ce`, and `ce_even` and `z_loss` where the objective has them; with a teacher also
        `kd` (with its factor; several terms also one by one), `agreement` (share of tokens whose likeliest next token
        is the same), both confidences and entropies, and `teacher_ce`, as far as the signal tells them.

    Raises:
        UserError: shapes or vocabularies that do not fit, or a divergence that the signal does not give.
    """
    check_shapes(student_hidden_ND=student_hidden_ND, student_head_DV=student_head.w_DV)
    check_shapes(student_hidden_ND=student_hidden_ND, targets_N=targets_N, ce_N=ce_weight_N, kd_N=kd_weight_N)
    weights = token_weights or {}
    check_shapes(targets_N=targets_N, **{f"token_weights[{name!r}]_N": x for name, x in weights.items()})
    if signal is not None:
        kind = Dense if isinstance(signal, Signal | Mixture) else type(signal)
        check_terms(objective, kind, getattr(signal, "temperature", 1.0), weights)
    student_head, teacher, heads = _fit(student_hidden_ND, student_head, signal)
    teacher, heads, weights = lax.stop_gradient((teacher, heads, weights))
    given = (teacher, targets_N, ce_weight_N, kd_weight_N, weights), heads, jnp.float32(progress)
    loss, parts = IMPLEMENTATIONS[objective.implementation](objective, shard, (student_hidden_ND, student_head), given)
    if objective.debug:
        parts |= {f"not_finite_{name}": _not_finite(x) for name, x in _looked_at(student_hidden_ND, teacher).items()}
    return loss, parts


def _fit(hidden_ND: Array, head: Head, signal: AnySignal | None) -> tuple[Head, Any, tuple[Head, ...]]:
    """Return the student's head, what each token has of the teacher, and the teachers' heads, all of equal columns."""
    if signal is None:
        return head, None, ()
    if isinstance(signal, TopK | Sampled):
        check_shapes(student_hidden_NX=hidden_ND, ids_NP=signal.ids_NP, log_probs_NP=signal.log_probs_NP)
        return head, signal, ()
    signals = signal.signals if isinstance(signal, Mixture) else (signal,)
    for one in signals:
        check_shapes(student_hidden_NX=hidden_ND, teacher_hidden_ND=one.hidden_ND)
        check_shapes(teacher_hidden_ND=one.hidden_ND, teacher_head_DV=one.head.w_DV)
        if head.vocab_size != one.head.vocab_size:
            raise UserError(
                f"student vocabulary {head.vocab_size}, teacher vocabulary {one.head.vocab_size}: "
                "a divergence compares one vocabulary; give both models one tokenizer"
            )
    columns = min(one.w_DV.shape[1] for one in (head, *(one.head for one in signals)))
    weights_NK = None
    if isinstance(signal, Mixture):
        weights_NK = jnp.broadcast_to(signal.weights_K, (hidden_ND.shape[0], len(signals)))
    heads = tuple(_first_columns(one.head, columns) for one in signals)
    return _first_columns(head, columns), Hidden(tuple(one.hidden_ND for one in signals), weights_NK), heads


def _first_columns(head: Head, columns: int) -> Head:
    """Return the head without padding columns beyond `columns`; both models then have equally many."""
    if head.w_DV.shape[1] == columns:
        return head
    return replace(head, w_DV=head.w_DV[:, :columns], bias_V=None if head.bias_V is None else head.bias_V[:columns])


def _looked_at(student_hidden_ND: Array, teacher: Any) -> dict[str, Array]:
    """Return the arrays that should be finite, by name."""
    named = {"student_hidden": student_hidden_ND}
    if isinstance(teacher, Hidden):
        return named | {f"teacher_{number}_hidden": x for number, x in enumerate(teacher.states)}
    return named if teacher is None else named | {"teacher_log_probs": teacher.log_probs_NP}


def _not_finite(x: Array) -> Array:
    return jnp.sum(~jnp.isfinite(x)).astype(jnp.float32)
