"""From all of a teacher's probabilities to the few that are kept: the most likely ones, or random draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError
from kdjax.losses.logits import head_logits, log_sum_exp, vocabulary
from kdjax.losses.objective import ObjectiveConfig
from kdjax.losses.sizes import chunk_size
from kdjax.shapes import Array, Head, Sampled, TopK

T = TypeVar("T")

BLOCK = 256
"""Entries of a block whose probabilities are summed before one of them is drawn."""


def top_k(log_probs_NV: Array, k: int, temperature: float = 1.0) -> TopK:
    """Return the k most likely entries of each row and the mass of the others, not renormalised.

    Args:
        log_probs_NV: log-probabilities at `temperature`, over the whole vocabulary.
        k: entries to keep, P.
        temperature: is noted, not applied.
    """
    _check(k, log_probs_NV.shape[1], "k")
    log_probs_NP, ids_NP = lax.top_k(log_probs_NV, k)
    rows_N1 = jnp.arange(ids_NP.shape[0])[:, None]
    others_NV = jnp.exp(log_probs_NV).at[rows_N1, ids_NP].set(0.0)  # summed as they are: 1 − Σ would cancel
    return TopK(ids_NP, log_probs_NP, jnp.log(jnp.sum(others_NV, axis=1)), temperature)


def sample(keys_N: Array, log_probs_NV: Array, draws: int, temperature: float = 1.0) -> Sampled:
    """Return entries drawn with replacement from each row's own distribution, each of weight 1/P.

    A draw turns a uniform number into an entry by the sums of probabilities up to each: first of blocks of entries,
    then within one. So it costs a pass over the vocabulary, however many draws there are.

    Paper: Anshumann et al. 2025, Sparse Logit Sampling, arXiv:2503.16870, section 3 (proposal q = p).

    Args:
        keys_N: a PRNG key for each row.
        log_probs_NV: log-probabilities at `temperature`, over the whole vocabulary.
        draws: per row, P.
        temperature: is noted, not applied.
    """
    _check(draws, None, "draws")
    columns = log_probs_NV.shape[1]
    width = min(BLOCK, columns)
    probs_NV = jnp.pad(jnp.exp(log_probs_NV), ((0, 0), (0, -columns % width)))
    probs_NXW = probs_NV.reshape(len(probs_NV), -1, width)
    upto_NX = jnp.cumsum(jnp.sum(probs_NXW, axis=2), axis=1)
    share_NP = jax.vmap(lambda key: jax.random.uniform(key, (draws,)))(keys_N)
    height_NP = share_NP * upto_NX[:, -1:]
    block_NP = _first_above(upto_NX[:, None], height_NP)
    before_NX = jnp.pad(upto_NX, ((0, 0), (1, 0)))
    rest_NP = jnp.maximum(height_NP - jnp.take_along_axis(before_NX, block_NP, axis=1), 0.0)
    within_NPW = jnp.take_along_axis(probs_NXW, block_NP[:, :, None], axis=1)
    ids_NP = block_NP * width + _first_above(jnp.cumsum(within_NPW, axis=2), rest_NP)
    log_probs_NP = jnp.take_along_axis(log_probs_NV, ids_NP, axis=1)
    return Sampled(ids_NP, jnp.full(ids_NP.shape, 1 / draws, jnp.float32), log_probs_NP, temperature)


def _first_above(upto_NPX: Array, height_NP: Array) -> Array:
    """Return the first place whose sum is above a height, of rising sums; the last place that adds to it, at most."""
    place_NP = jnp.sum(upto_NPX <= height_NP[:, :, None], axis=2, dtype=jnp.int32)
    last_NP = jnp.argmax(upto_NPX >= upto_NPX[:, :, -1:], axis=2).astype(jnp.int32)
    return jnp.minimum(place_NP, last_NP)


def of_head(hidden_ND: Array, head: Head, temperature: float, read: Callable[[Array, Array, Array], T]) -> T:
    """Return what `read` makes of a head's log-probabilities, a chunk of the tokens at a time: never of all at once.

    Args:
        hidden_ND: of the tokens.
        head: whose matrix is cast to the hidden states' dtype.
        temperature: that logits are divided by.
        read: of (log_probs_CV, log_z_C, rows_C: which tokens these are) -> arrays with a leading C.
    """
    n = len(hidden_ND)
    chunk = chunk_size(ObjectiveConfig(), n, head.w_DV.shape[1])
    rows = jnp.arange(n + -n % chunk)
    over = vocabulary(head)

    def of(rows_C: Array) -> T:
        hidden_CD = jnp.take(hidden_ND, rows_C, axis=0, mode="clip")
        logits_CV = head_logits(hidden_CD, head) / temperature
        log_z_C = log_sum_exp(logits_CV, over)
        return read(logits_CV - log_z_C[:, None], log_z_C, rows_C)

    found = jax.lax.map(of, rows.reshape(-1, chunk))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], found)


def _check(count: int, most: int | None, name: str) -> None:
    if count < 1 or (most is not None and count > most):
        wanted = "at least 1" if most is None else f"at least 1 and at most the vocabulary, {most}"
        raise UserError(f"{name} is {count}; wanted {wanted}")
