"""Prompts -> continuations: prefill and decode with a key/value cache, all of it under one jit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError
from kdjax.losses import head_logits
from kdjax.models import Cache, Model
from kdjax.shapes import Array, View

PROMPT_UNIT = 32
"""Prompts are padded to a multiple of this, so that few lengths are compiled."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Choose among so many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens that hold this probability together."""

    def check(self) -> None:
        """Check the ranges.

        Raises:
            UserError: for a value outside its range.
        """
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; wanted 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; wanted 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; wanted above 0 and at most 1")


def generate(
    model: Model,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Return each prompt's continuation, up to and with the first of `eos_ids`; of an encoder-decoder what it answers.

    A draw depends on the seed, the prompt's number and the step alone.

    Raises:
        UserError: for an empty or over-long prompt, a token outside the vocabulary, or a bad sampling value.
    """
    sampling = Sampling(temperature, top_k, top_p)
    sampling.check()
    if not prompts:
        return []
    _check_prompts(model, prompts, max_new_tokens)
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(prompts)))
    view = _left_padded(prompts)
    if model.config.encoder_layers:
        view = replace(_left_padded([[model.config.start_token]] * len(prompts), unit=1), encoder=view)
    tokens_BN = np.asarray(_run(model, sampling, max_new_tokens, tuple(eos_ids), params, view, keys_B))
    return [_until_eos(row.tolist(), eos_ids) for row in tokens_BN]


def _check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; wanted at least 1")
    if not model.config.causal:
        raise UserError("the model is an encoder, which continues no text; wanted a decoder or an encoder-decoder")
    limit, vocab_size = model.config.max_positions, model.config.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty; wanted at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            bad = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"prompt {number} has token {bad}, outside the model's vocabulary of {vocab_size}")
        if not model.config.encoder_layers and len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and {max_new_tokens} new ones were asked for; "
                f"the model holds {limit} positions: shorten the prompt or lower max_new_tokens"
            )


def _left_padded(prompts: Sequence[Sequence[int]], unit: int = PROMPT_UNIT) -> View:
    """Return the prompts ending in the same column, padding (segment 0) before them."""
    width = -(-max(map(len, prompts)) // unit) * unit
    tokens_BT, segment_BT, position_BT = (np.zeros((len(prompts), width), np.int32) for _ in range(3))
    for row, prompt in enumerate(prompts):
        tokens_BT[row, -len(prompt) :] = prompt
        segment_BT[row, -len(prompt) :] = 1
        position_BT[row, -len(prompt) :] = np.arange(len(prompt))
    return View(tokens_BT, segment_BT, position_BT)


def _until_eos(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    end = next((at + 1 for at, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tokens[:end]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    model: Model, sampling: Sampling, new: int, eos_ids: tuple[int, ...], params: dict, view: View, keys_B: Array
) -> Array:
    """Return tokens_BN: so many new tokens a row, zeros after all rows have ended."""
    batch, width = view.tokens_BT.shape
    params = jax.tree_util.tree_map_with_path(partial(_cast_matrix, model.dtype), params)
    head = model.head(params)

    def step(view: View, cache: Cache, number: Array | int) -> tuple[Array, Cache]:
        output = model.apply(params, view, cache=cache)
        logits_BV = head_logits(output.hidden_BTD[:, -1], head)
        return choose(logits_BV, sampling, jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)), output.cache

    def ended(token_B: Array) -> Array:
        return jnp.isin(token_B, jnp.array(eos_ids, jnp.int32))

    def unfinished(state: Any) -> Array:
        number, *_, done_B = state
        return (number < new) & ~done_B.all()

    def decode(state: Any) -> Any:
        number, tokens_BN, token_B, position_B, cache, done_B = state
        one = View(token_B[:, None], jnp.ones((batch, 1), jnp.int32), position_B[:, None])
        token_B, cache = step(one, cache, number)
        tokens_BN = jax.lax.dynamic_update_slice_in_dim(tokens_BN, token_B[:, None], number, axis=1)
        return number + 1, tokens_BN, token_B, position_B + 1, cache, done_B | ended(token_B)

    token_B, cache = step(view, model.empty_cache(batch, width + new), 0)
    tokens_BN = jnp.zeros((batch, new), jnp.int32).at[:, 0].set(token_B)
    state = (jnp.int32(1), tokens_BN, token_B, jnp.asarray(view.position_BT)[:, -1] + 1, cache, ended(token_B))
    return jax.lax.while_loop(unfinished, decode, state)[1]


def _cast_matrix(dtype: str, path: Any, leaf: Array) -> Array:
    """Return a matrix in the compute dtype, cast once and not in every step; norms stay as they are."""
    return leaf.astype(dtype) if path[-1].key in ("kernel", "embedding") else leaf


def choose(logits_BV: Array, sampling: Sampling, keys_B: Array) -> Array:
    """Return a token for each row: the likeliest, or a draw by the row's key after temperature, top-k and top-p."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0:
        logits_BV = jnp.where(logits_BV >= _least_kept(logits_BV, sampling), logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _least_kept(logits_BV: Array, sampling: Sampling) -> Array:
    """Return, [B, 1], the smallest logit among the top-k and within top-p of those."""
    falling_BV = jnp.sort(logits_BV, axis=-1, descending=True)[:, : sampling.top_k or None]
    if sampling.top_p < 1.0:
        probability_BV = jax.nn.softmax(falling_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        falling_BV = jnp.where(before_BV < sampling.top_p, falling_BV, jnp.inf)
    return falling_BV.min(-1, keepdims=True)
