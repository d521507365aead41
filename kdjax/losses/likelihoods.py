"""Log-likelihoods of given tokens, by logits of a chunk of tokens at a time: with a gradient, or without."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError
from kdjax.losses.chunk import Tokens, mixed
from kdjax.losses.fused import Heads, Shard, fused_kd_loss, one_device
from kdjax.losses.logits import finish, log_softmax, matmul, vocabulary
from kdjax.losses.objective import ObjectiveConfig
from kdjax.losses.policy import IMPORTANCE, TO_GO
from kdjax.losses.sizes import chunk_size
from kdjax.shapes import AnySignal, Array, Axes, Head, Mixture, Signal, check_shapes


def target_log_probs(
    hidden_ND: Array,
    head: Head,
    targets_N: Array,
    objective: ObjectiveConfig,
    temperature: float = 1.0,
    *,
    shard: Shard = one_device,
) -> Array:
    """Return log q(y) of each target y, float32 without gradient, by logits of a chunk of tokens at a time.

    Args:
        hidden_ND: as `fused_kd_loss` takes the student's.
        head: likewise.
        targets_N: tokens, int32.
        objective: its chunk size is used.
        temperature: that logits are divided by.
        shard: spreads tokens over a mesh.
    """
    check_shapes(hidden_ND=hidden_ND, head_DV=head.w_DV, targets_N=targets_N)
    zeros_N = jnp.zeros(len(targets_N), jnp.float32)
    tokens = Tokens(hidden_ND, None, targets_N, zeros_N, zeros_N, {})

    def local(axes: Axes, tokens: Tokens, heads: Heads, temperature: Array) -> tuple[Array, Array, None]:
        n, over = len(tokens.targets_N), vocabulary(heads.student, axes)
        chunk = chunk_size(objective, n, heads.student.w_DV.shape[1])

        def of_chunk(rows_C: Array) -> Array:
            some = jax.tree.map(lambda x: jnp.take(x, rows_C, axis=0, mode="clip"), tokens)
            logits_CV = finish(matmul(some.student_ND, heads.student), heads.student, axes)
            return over.pick(log_softmax(logits_CV / temperature, over), some.targets_N[:, None])[:, 0]

        found = lax.map(of_chunk, jnp.arange(n + -n % chunk).reshape(-1, chunk))
        return jnp.float32(0), found.reshape(-1)[:n], None

    found = shard(local, *lax.stop_gradient((tokens, Heads(head), jnp.float32(temperature))))
    return lax.stop_gradient(found[1])


def said_log_probs(
    signal: AnySignal | None,
    targets_N: Array,
    objective: ObjectiveConfig,
    temperature: float = 1.0,
    *,
    shard: Shard = one_device,
) -> Array:
    """Return log p(y) of each target y, of a teacher or a mixture whose logits are whole: as `target_log_probs`.

    Raises:
        UserError: a signal without all logits.
    """
    if not isinstance(signal, Signal | Mixture):
        raise UserError(
            f"{', '.join(TO_GO)} and {IMPORTANCE} need all of the teacher's logits; run it live, or keep hidden states"
        )
    signals = signal.signals if isinstance(signal, Mixture) else (signal,)
    found = [
        target_log_probs(one.hidden_ND, one.head, targets_N, objective, temperature, shard=shard)[:, None]
        for one in signals
    ]
    weights_NK = None
    if isinstance(signal, Mixture):
        weights_NK = jnp.broadcast_to(signal.weights_K, (len(targets_N), len(signals)))
    return mixed(found, weights_NK)[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def log_likelihoods(
    hidden_ND: Array, head: Head, targets_N: Array, objective: ObjectiveConfig, shard: Shard = one_device
) -> Array:
    """Return log q(y) of each target y at temperature 1, differentiable in hidden states and head.

    Logits exist for one chunk at a time on the way back too: that is the cross entropy's gradient, weighed by what
    comes from above. So whatever is made of log-likelihoods of tokens, of whole texts say, can be trained.

    Args:
        hidden_ND: as `fused_kd_loss` takes the student's.
        head: likewise.
        targets_N: tokens, int32.
        objective: its chunk size is used.
        shard: spreads tokens over a mesh.
    """
    return target_log_probs(hidden_ND, head, targets_N, objective, shard=shard)


def _log_likelihoods_forward(hidden_ND, head, targets_N, objective, shard):
    return log_likelihoods(hidden_ND, head, targets_N, objective, shard), (hidden_ND, head, targets_N)


def _log_likelihoods_backward(objective, shard, residuals, cotangent_N):
    *trained, targets_N = residuals
    plain = ObjectiveConfig(alpha=1.0, chunk_tokens=objective.chunk_tokens, chunk_mib=objective.chunk_mib)

    def likelihood(hidden_ND: Array, head: Head) -> Array:
        weights = -cotangent_N, jnp.zeros_like(cotangent_N)
        return fused_kd_loss(hidden_ND, head, None, targets_N, *weights, plain, shard=shard)[0]

    return *jax.grad(likelihood, argnums=(0, 1))(*trained), None


log_likelihoods.defvjp(_log_likelihoods_forward, _log_likelihoods_backward)
