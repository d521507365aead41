"""Cross entropy and divergence to the teacher from hidden states and heads; logits exist for one chunk at a time.

The gradient is computed in the forward pass, chunk by chunk, by `jax.vjp` on the chunk's [C, V] logits: the residuals
are the gradients themselves, and evaluation pays nothing for them.
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
from kdjax.losses.divergences import DIVERGENCES
from kdjax.losses.objective import ObjectiveConfig
from kdjax.shapes import Array, Axes, Head, Signal, check_shapes

NOWHERE = -1e30
"""The logit of a vocabulary entry that does not exist: finite, so that differences of two of them are 0, not NaN."""


class Tokens(NamedTuple):
    """What belongs to a token: every leaf has a leading N."""

    student_ND: Array
    teacher_ND: Array | None
    targets_N: Array
    ce_weight_N: Array
    kd_weight_N: Array


class Heads(NamedTuple):
    """What all tokens share: every leaf ends in V."""

    student: Head
    teacher: Head | None


Local = Callable[[Axes, Tokens, Heads], Any]
Shard = Callable[[Local, Tokens, Heads], Any]
"""Runs `local` on each device's own tokens; `kdjax.sharding` has the one for a mesh."""


def one_device(local: Local, tokens: Tokens, heads: Heads) -> Any:
    """Return ``local`` of all tokens: nothing is shared out."""
    return local(Axes(), tokens, heads)


def _parts(axes: Axes) -> int:
    """Return over how many devices the vocabulary is spread."""
    return 1 if axes.tensor is None else lax.axis_size(axes.tensor)


def _over_V(axes: Axes, reduce: Callable[..., Array], join: Callable[..., Array], x_NV: Array) -> Array:
    """Return `x_NV` reduced over the vocabulary, joined over the tensor axis."""
    local_N = reduce(x_NV, axis=-1)
    return local_N if axes.tensor is None else join(local_N, axes.tensor)


def head_logits(hidden_ND: Array, head: Head, axes: Axes = Axes()) -> Array:  # noqa: B008 (a constant)
    """Return float32 logits_NV of a head: scaled, soft-capped, with padded vocabulary entries at `NOWHERE`."""
    return _finish(_matmul(hidden_ND, head), head.bias_V, head, axes)


def _matmul(hidden_ND: Array, head: Head) -> Array:
    w_DV = head.w_DV.astype(hidden_ND.dtype)
    return jnp.einsum("nd,dv->nv", hidden_ND, w_DV, preferred_element_type=jnp.float32)


def _finish(raw_NV: Array, bias_V: Array | None, head: Head, axes: Axes) -> Array:
    """Return logits from the bare product of hidden states and matrix."""
    logits_NV = raw_NV if bias_V is None else raw_NV + bias_V.astype(jnp.float32)[None, :]
    if head.scale is not None:
        logits_NV = logits_NV * head.scale
    if head.soft_cap is not None:
        logits_NV = head.soft_cap * jnp.tanh(logits_NV / head.soft_cap)
    columns = raw_NV.shape[1] * _parts(axes)
    return (
        jnp.where(_ids(logits_NV, axes) < head.vocab_size, logits_NV, NOWHERE)
        if columns > head.vocab_size
        else logits_NV
    )


def _ids(logits_NV: Array, axes: Axes) -> Array:
    """Return the vocabulary id of each column, [1, V]."""
    ids_1V = lax.broadcasted_iota(jnp.int32, (1, logits_NV.shape[1]), 1)
    return ids_1V if axes.tensor is None else ids_1V + lax.axis_index(axes.tensor) * logits_NV.shape[1]


def _log_softmax(logits_NV: Array, axes: Axes) -> Array:
    top_N1 = _over_V(axes, jnp.max, lax.pmax, lax.stop_gradient(logits_NV))[:, None]
    shifted_NV = logits_NV - top_N1
    return shifted_NV - jnp.log(_over_V(axes, jnp.sum, lax.psum, jnp.exp(shifted_NV)))[:, None]


def _terms(objective: ObjectiveConfig, axes: Axes, tokens: Tokens, student_NV: Array, teacher_NV: Array | None):
    """Return the weighted loss of a chunk of logits, and its parts; the parts carry no gradient."""
    sum_V = partial(_over_V, axes, jnp.sum, lax.psum)
    is_target_NV = _ids(student_NV, axes) == tokens.targets_N[:, None]

    def cross_entropy(log_NV: Array) -> Array:
        return -sum_V(jnp.where(is_target_NV, log_NV, 0.0))

    ce = jnp.sum(tokens.ce_weight_N * cross_entropy(_log_softmax(student_NV, axes)))
    if teacher_NV is None:
        return ce, {"ce": ce}
    row, t = DIVERGENCES[objective.divergence], objective.temperature
    loss_N = row.function(_log_softmax(student_NV / t, axes), _log_softmax(teacher_NV / t, axes), sum_V)
    kd = row.factor(t) * jnp.sum(tokens.kd_weight_N * loss_N)
    parts = {
        "ce": ce,
        "kd": kd,
        "teacher_ce": jnp.sum(tokens.ce_weight_N * cross_entropy(_log_softmax(teacher_NV, axes))),
        "agreement": jnp.sum(tokens.kd_weight_N * _agree(student_NV, teacher_NV, axes)),
    }
    return objective.alpha * ce + (1 - objective.alpha) * kd, parts


def _agree(student_NV: Array, teacher_NV: Array, axes: Axes) -> Array:
    """Return 1.0 where one vocabulary entry is the largest of both, else 0.0 (maxima only: argmax is slow on CPUs)."""

    def is_top(logits_NV: Array) -> Array:
        return logits_NV == _over_V(axes, jnp.max, lax.pmax, logits_NV)[:, None]

    student_NV, teacher_NV = lax.stop_gradient(student_NV), lax.stop_gradient(teacher_NV)
    both_NV = jnp.where(is_top(student_NV) & is_top(teacher_NV), 1.0, 0.0)
    return _over_V(axes, jnp.max, lax.pmax, both_NV)


def _chunk(objective: ObjectiveConfig, axes: Axes, heads: Heads, with_gradients: bool, tokens: Tokens):
    """Return the loss and parts of one chunk, and float32 gradients (dh_CD, dw_DV, dbias_V) if asked for."""
    head, bias_V = heads.student, heads.student.bias_V
    teacher_CV = None if heads.teacher is None else head_logits(tokens.teacher_ND, heads.teacher, axes)

    def of_raw(raw_CV: Array, bias_V: Array | None):
        return _terms(objective, axes, tokens, _finish(raw_CV, bias_V, head, axes), teacher_CV)

    raw_CV = _matmul(tokens.student_ND, head)
    if not with_gradients:
        return of_raw(raw_CV, bias_V), None
    loss, pullback, parts = jax.vjp(of_raw, raw_CV, bias_V, has_aux=True)
    # Every device of the tensor axis holds a copy of the loss, and psum's pullback adds up what all copies send.
    d_raw_CV, d_bias_V = pullback(jnp.float32(1 / _parts(axes)))
    # Cast once, before both matmuls, which accumulate in float32: bf16 gradients then err by 0.2 to 0.3 %.
    d_raw_CV, w_DV = d_raw_CV.astype(tokens.student_ND.dtype), head.w_DV.astype(tokens.student_ND.dtype)
    dh_CD = jnp.einsum("cv,dv->cd", d_raw_CV, w_DV, preferred_element_type=jnp.float32)
    dw_DV = jnp.einsum("cd,cv->dv", tokens.student_ND, d_raw_CV, preferred_element_type=jnp.float32)
    return (loss, parts), (dh_CD, dw_DV, d_bias_V)


def _chunked(objective: ObjectiveConfig, with_gradients: bool, axes: Axes, tokens: Tokens, heads: Heads):
    """Return (loss, parts) summed over all tokens of the mesh, and the gradients of this device's share or None."""
    n = tokens.targets_N.shape[0]
    chunk = min(objective.chunk_tokens, n)
    chunks = -(-n // chunk)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, chunks * chunk - n)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(chunks, chunk, *x.shape[1:])

    def body(totals, tokens_C: Tokens):
        sums, gradients = _chunk(objective, axes, heads, with_gradients, tokens_C)
        dh_CD = gradients[0] if gradients else None
        return jax.tree.map(jnp.add, totals, (sums, gradients[1:] if gradients else None)), dh_CD

    one = jax.tree.map(lambda x: x[:chunk], tokens)
    sums, gradients = jax.eval_shape(partial(_chunk, objective, axes, heads, with_gradients), one)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, gradients[1:] if gradients else None))
    (sums, head_gradients), dh = lax.scan(body, start, jax.tree.map(cut, tokens))
    sums, head_gradients = lax.psum((sums, head_gradients), axes.batch) if axes.batch else (sums, head_gradients)
    if dh is None:
        return sums, None, None
    dh_ND = dh.reshape(chunks * chunk, -1)[:n]
    dh_ND = dh_ND if axes.tensor is None else lax.psum(dh_ND, axes.tensor)
    return sums, dh_ND.astype(tokens.student_ND.dtype), head_gradients


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(objective: ObjectiveConfig, shard: Shard, trained: tuple[Array, Head], rest: dict, teacher: Head | None):
    tokens, heads = Tokens(trained[0], **rest), Heads(trained[1], teacher)
    sums, _, _ = shard(partial(_chunked, objective, False), tokens, heads)
    return sums


def _loss_forward(objective, shard, trained, rest, teacher):
    hidden_ND, head = trained
    tokens, heads = Tokens(hidden_ND, **rest), Heads(head, teacher)
    sums, dh_ND, (dw_DV, d_bias_V) = shard(partial(_chunked, objective, True), tokens, heads)
    d_head = replace(head, w_DV=dw_DV.astype(head.w_DV.dtype), bias_V=d_bias_V)
    return sums, (dh_ND, d_head)


def _loss_backward(objective, shard, gradients, cotangents):
    of_loss, _ = cotangents
    return jax.tree.map(lambda x: (x * of_loss).astype(x.dtype), gradients), None, None


_loss.defvjp(_loss_forward, _loss_backward)


def fused_kd_loss(
    student_hidden_ND: Array,
    student_head: Head,
    signal: Signal | None,
    targets_N: Array,
    ce_weight_N: Array,
    kd_weight_N: Array,
    objective: ObjectiveConfig,
    *,
    shard: Shard = one_device,
) -> tuple[Array, dict[str, Array]]:
    """Return the summed loss Σ α·w_ce·CE + (1 − α)·w_kd·f(T)·D and its parts, without logits for all tokens.

    Differentiable in `student_hidden_ND` and the student head's matrix and bias; the signal, targets and weights get
    no gradient, and nor do the parts. Arithmetic on logits is float32 whatever the inputs are. Peak temporary memory
    is O(chunk_tokens·V).

    Args:
        student_hidden_ND: hidden states at the compared rows, in the compute dtype.
        student_head: in its stored dtype, cast inside.
        signal: what the teacher says, or None for the cross entropy alone.
        targets_N: next tokens, int32.
        ce_weight_N: divided by the global weight already, so that losses of microbatches and devices add up.
        kd_weight_N: likewise; the two totals may differ.
        objective: α, temperature, divergence, chunk size.
        shard: spreads tokens over a mesh; then weights are global and the result is the sum over all devices.

    Returns:
        The loss, and weighted sums: `ce`; with a teacher also `kd` (with its factor), `teacher_ce` and `agreement`
        (share of tokens whose most likely next token is the same).

    Raises:
        UserError: shapes or vocabularies that do not fit.
    """
    check_shapes(student_hidden_ND=student_hidden_ND, student_head_DV=student_head.w_DV)
    check_shapes(student_hidden_ND=student_hidden_ND, targets_N=targets_N, ce_N=ce_weight_N, kd_N=kd_weight_N)
    teacher_ND, teacher = None, None
    if signal is not None:
        check_shapes(student_hidden_NX=student_hidden_ND, teacher_hidden_ND=signal.hidden_ND)
        check_shapes(teacher_hidden_ND=signal.hidden_ND, teacher_head_DV=signal.head.w_DV)
        if student_head.vocab_size != signal.head.vocab_size:
            raise UserError(
                f"student vocabulary {student_head.vocab_size}, teacher vocabulary {signal.head.vocab_size}: "
                "a divergence compares one vocabulary; give both models one tokenizer"
            )
        columns = min(student_head.w_DV.shape[1], signal.head.w_DV.shape[1])
        student_head = _first_columns(student_head, columns)
        teacher_ND, teacher = lax.stop_gradient((signal.hidden_ND, _first_columns(signal.head, columns)))
    rest = {
        "teacher_ND": teacher_ND,
        "targets_N": targets_N,
        "ce_weight_N": ce_weight_N,
        "kd_weight_N": kd_weight_N,
    }
    return _loss(objective, shard, (student_hidden_ND, student_head), rest, teacher)


def _first_columns(head: Head, columns: int) -> Head:
    """Return the head without padding columns beyond `columns`; both models then have equally many."""
    if head.w_DV.shape[1] == columns:
        return head
    return replace(head, w_DV=head.w_DV[:, :columns], bias_V=None if head.bias_V is None else head.bias_V[:columns])
