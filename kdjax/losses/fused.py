"""Cross entropy and divergence to the teacher from hidden states and heads; logits exist for one chunk at a time.

The gradient is computed in the forward pass: the matmuls of a chunk as a whole, and between them `jax.vjp` on the
logits of one block of its rows after the other, so that what the loss needs of them stays small. The residuals are the
gradients themselves, and evaluation pays nothing for them. Tokens of weight 0 are never looked at.
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
from kdjax.losses.chunk import Dense, Hidden, Other, Tokens, check_terms, chunk_loss
from kdjax.losses.logits import finish, matmul, vocabulary
from kdjax.losses.objective import ObjectiveConfig
from kdjax.losses.sizes import block_size, chunk_size, product_columns
from kdjax.shapes import AnySignal, Array, Axes, Head, Mixture, Sampled, Signal, TopK, check_shapes


class Heads(NamedTuple):
    """What all tokens share: every leaf ends in V."""

    student: Head
    teachers: tuple[Head, ...] = ()
    student_of_U: Array | None = None


Gradients = tuple[Array, tuple[Array, Array | None]]
"""(dh_ND, (dw_DV, dbias_V))."""
Local = Callable[[Axes, Tokens, Heads, Array], Any]
Shard = Callable[[Local, Tokens, Heads, Array], Any]
"""Runs `local` on each device's own tokens; `kdjax.sharding` has the one for a mesh."""


def one_device(local: Local, tokens: Tokens, heads: Heads, progress: Array) -> Any:
    """Return ``local`` of all tokens: nothing is shared out."""
    return local(Axes(), tokens, heads, progress)


def _products(tokens: Tokens, heads: Heads) -> tuple[Array, tuple[Array, ...]]:
    """Return the bare products of hidden states and matrices: the student's, and those of teachers that have such."""
    states = tokens.teacher.states if isinstance(tokens.teacher, Hidden) else ()
    pairs = zip(states, heads.teachers, strict=True)
    return matmul(tokens.student_ND, heads.student), tuple(matmul(hidden_ND, head) for hidden_ND, head in pairs)


def _loss(objective: ObjectiveConfig, axes: Axes, heads: Heads, progress: Array, tokens: Tokens, teachers, raw_NV):
    """Return the loss and parts of the student's bare product `raw_NV` and the teachers'."""
    teacher, head = tokens.teacher, heads.student
    if heads.student_of_U is not None:
        (raw_NU,), (theirs,) = teachers, heads.teachers
        teacher = Other(finish(raw_NU, theirs), vocabulary(theirs), heads.student_of_U)
    elif isinstance(teacher, Hidden):
        logits = (finish(raw_NV, head, axes) for raw_NV, head in zip(teachers, heads.teachers, strict=True))
        teacher = Dense(tuple(logits), teacher.weights_NK)
    return chunk_loss(objective, vocabulary(head, axes), tokens, progress, finish(raw_NV, head, axes), teacher)


def _chunk(objective: ObjectiveConfig, axes: Axes, heads: Heads, with_gradients: bool, progress: Array, tokens: Tokens):
    """Return the loss and parts of one chunk, and the loss's gradient in the student's bare product, or None.

    The matmuls take the chunk as a whole; the logits are gone through block by block.
    """
    raw_CV, teachers = _products(tokens, heads)
    rows = block_size(*raw_CV.shape)
    blocks = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (tokens, teachers, raw_CV))

    def block(given):
        *given, raw_RV = given
        loss = partial(_loss, objective, axes, heads, progress, *given)
        if not with_gradients:
            return loss(raw_RV), None
        loss, pullback, parts = jax.vjp(loss, raw_RV, has_aux=True)
        # Every device of the tensor axis holds a copy of the loss, and psum's pullback adds up what all copies send.
        (d_raw_RV,) = pullback(jnp.float32(1 / vocabulary(heads.student, axes).parts))
        return (loss, parts), d_raw_RV

    sums, d_raw = lax.map(block, blocks)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), d_raw.reshape(raw_CV.shape) if with_gradients else None


def _add_gradients(gradients: Gradients, head: Head, rows_C: Array, hidden_CD: Array, d_raw_CV: Array) -> Gradients:
    """Return the gradients with those of one chunk, whose tokens stand at `rows_C`.

    Matmuls are in the hidden states' dtype and accumulate in float32: bf16 gradients then err by 0.2 to 0.3 %.
    """
    (dh_ND, (dw_DV, d_bias_V)), dtype = gradients, hidden_CD.dtype
    d_CV, w_DV = d_raw_CV.astype(dtype), head.w_DV.astype(dtype)
    dh_CD = jnp.einsum("cv,dv->cd", d_CV, w_DV, preferred_element_type=jnp.float32)
    dh_ND = dh_ND.at[rows_C].set(dh_CD.astype(dh_ND.dtype), mode="drop")
    if d_bias_V is not None:
        d_bias_V = d_bias_V + jnp.sum(d_raw_CV, axis=0)
    return dh_ND, (_add_product(dw_DV, hidden_CD, d_raw_CV), d_bias_V)


def _add_product(sum_DV: Array, hidden_CD: Array, d_raw_CV: Array) -> Array:
    """Return sum + hiddenᵀ·d_raw in float32, some columns at a time: the product as a whole never exists."""
    d, columns = sum_DV.shape
    width = product_columns(d, columns)
    hidden_DC = lax.optimization_barrier(hidden_CD.T)  # XLA's matmuls for CPUs are slower the other way round

    def add(first, width: int, sum_DV: Array) -> Array:
        old_DX, d_CX = (lax.dynamic_slice_in_dim(x, first, width, axis=1) for x in (sum_DV, d_raw_CV))
        d_CX = d_CX.astype(hidden_CD.dtype)
        new_DX = old_DX + jnp.einsum("dc,cv->dv", hidden_DC, d_CX, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(sum_DV, new_DX, first, axis=1)

    whole, rest = divmod(columns, width)
    sum_DV = lax.fori_loop(0, whole, lambda number, sum_DV: add(number * width, width, sum_DV), sum_DV)
    return add(whole * width, rest, sum_DV) if rest else sum_DV


def _chunked(
    objective: ObjectiveConfig, with_gradients: bool, axes: Axes, tokens: Tokens, heads: Heads, progress: Array
):
    """Return (loss, parts) summed over all tokens of the mesh, and the gradients of this device's share or None.

    Tokens that weigh something come first, and the loop ends with the last of them: the others' rows are never read.
    """
    (n, d), head = tokens.student_ND.shape, heads.student
    chunk = chunk_size(objective, n, head.w_DV.shape[1])
    weighs_N = (tokens.ce_weight_N != 0) | (tokens.kd_weight_N != 0)
    live = jnp.sum(weighs_N)
    order_N = jnp.where(jnp.arange(n) < live, jnp.argsort(~weighs_N, stable=True), n)
    order = jnp.pad(order_N, (0, -n % chunk), constant_values=n)
    of_chunk = partial(_chunk, objective, axes, heads, with_gradients, progress)

    def take(rows_C: Array) -> Tokens:
        return jax.tree.map(lambda x: jnp.take(x, rows_C, axis=0, mode="fill", fill_value=0), tokens)

    def add(number, totals):
        rows_C = lax.dynamic_slice_in_dim(order, number * chunk, chunk)
        some, (sums, gradients) = take(rows_C), totals
        more, d_raw_CV = of_chunk(some)
        if with_gradients:
            gradients = _add_gradients(gradients, head, rows_C, some.student_ND, d_raw_CV)
        return jax.tree.map(jnp.add, sums, more), gradients

    sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: of_chunk(take(order[:chunk]))[0]))
    gradients = None
    if with_gradients:
        dtype = tokens.student_ND.dtype if axes.tensor is None else jnp.float32
        gradients = jnp.zeros((n, d), dtype), jax.tree.map(_float_zeros, (head.w_DV, head.bias_V))
    # All devices of the tensor axis hold the same tokens, so they end together.
    sums, gradients = lax.fori_loop(0, -(-live // chunk), add, (sums, gradients))
    sums = lax.psum(sums, axes.batch) if axes.batch else sums
    if gradients is None:
        return sums, None, None
    dh_ND, of_head = gradients
    dh_ND = dh_ND if axes.tensor is None else lax.psum(dh_ND, axes.tensor)
    return sums, dh_ND.astype(tokens.student_ND.dtype), lax.psum(of_head, axes.batch) if axes.batch else of_head


def _float_zeros(x: Array) -> Array:
    return jnp.zeros(x.shape, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(objective: ObjectiveConfig, shard: Shard, trained: tuple[Array, Head], given: tuple):
    tokens, heads, progress = _put(trained, given)
    sums, _, _ = shard(partial(_chunked, objective, False), tokens, heads, progress)
    return sums


def _in_chunks_forward(objective, shard, trained, given):
    tokens, heads, progress = _put(trained, given)
    sums, dh_ND, (dw_DV, d_bias_V) = shard(partial(_chunked, objective, True), tokens, heads, progress)
    head = trained[1]
    d_bias_V = None if d_bias_V is None else d_bias_V.astype(head.bias_V.dtype)
    return sums, (dh_ND, replace(head, w_DV=dw_DV.astype(head.w_DV.dtype), bias_V=d_bias_V))


def _in_chunks_backward(objective, shard, gradients, cotangents):
    of_loss, _ = cotangents
    return jax.tree.map(lambda x: (x * of_loss).astype(x.dtype), gradients), None


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _put(trained: tuple[Array, Head], given: tuple) -> tuple[Tokens, Heads, Array]:
    (hidden_ND, head), (rest, theirs, progress) = trained, given
    return Tokens(hidden_ND, *rest), Heads(head, *theirs), progress


def _reference(objective: ObjectiveConfig, shard: Shard, trained: tuple[Array, Head], given: tuple):
    """Return the loss and parts from the logits of all tokens at once, differentiated by jax."""
    tokens, heads, progress = _put(trained, given)
    raw_NV, teachers = _products(tokens, heads)
    loss, parts = _loss(objective, Axes(), heads, progress, tokens, teachers, raw_NV)
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
        kind = kind if getattr(signal, "student_of_U", None) is None else Other
        check_terms(objective, kind, getattr(signal, "temperature", 1.0), weights)
    student_head, teacher, heads = _fit(student_hidden_ND, student_head, signal)
    theirs = heads, getattr(signal, "student_of_U", None)
    teacher, theirs, weights = lax.stop_gradient((teacher, theirs, weights))
    given = (teacher, targets_N, ce_weight_N, kd_weight_N, weights), theirs, jnp.float32(progress)
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
        if head.vocab_size != one.head.vocab_size and one.student_of_U is None:
            raise UserError(
                f"student vocabulary {head.vocab_size}, teacher vocabulary {one.head.vocab_size}: "
                "a divergence compares one vocabulary; give both models one tokenizer"
            )
    if isinstance(signal, Signal) and signal.student_of_U is not None:
        check_shapes(teacher_head_DU=signal.head.w_DV, student_of_U=signal.student_of_U)
        return head, Hidden((signal.hidden_ND,), None), (signal.head,)
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
