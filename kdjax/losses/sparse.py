"""From all of a teacher's probabilities to the few that are kept: the most likely ones, or random draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError
from kdjax.shapes import Array, Sampled, TopK


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

    Paper: Anshumann et al. 2025, Sparse Logit Sampling, arXiv:2503.16870, section 3 (proposal q = p).

    Args:
        keys_N: a PRNG key for each row.
        log_probs_NV: log-probabilities at `temperature`, over the whole vocabulary.
        draws: per row, P.
        temperature: is noted, not applied.
    """
    _check(draws, None, "draws")
    draw = jax.vmap(lambda key, log_V: jax.random.categorical(key, log_V, shape=(draws,)))
    ids_NP = draw(keys_N, log_probs_NV).astype(jnp.int32)
    log_probs_NP = jnp.take_along_axis(log_probs_NV, ids_NP, axis=1)
    return Sampled(ids_NP, jnp.full(ids_NP.shape, 1 / draws, jnp.float32), log_probs_NP, temperature)


def _check(count: int, most: int | None, name: str) -> None:
    if count < 1 or (most is not None and count > most):
        wanted = "at least 1" if most is None else f"at least 1 and at most the vocabulary, {most}"
        raise UserError(f"{name} is {count}; wanted {wanted}")
