"""Prompts -> continuations: prefill and decode under jit, with a key/value cache that stays where it is.

Decoding comes back to the host once in a block of tokens: there text is shown as it comes, and ended by strings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError
from kdjax.losses import head_logits
from kdjax.models import Cache, Model, Prefix, bare, compressed, prefix_of
from kdjax.models import gist as gists
from kdjax.models.soft_prompt import slots
from kdjax.sampling import Sampling, choose
from kdjax.shapes import Array, View, left_padded

PROMPT_UNIT = 32
"""Prompts are padded to a multiple of this, and what they share is cut to one, so that few lengths are compiled."""

BLOCK = 16
"""So many tokens a row are decoded between two looks of the host."""

GREEDY = Sampling()


class Beside(NamedTuple):
    """A second model that has a share in what each token is drawn from; it sees the answer behind its own prompt.

    Attributes:
        model: of the same vocabulary, a decoder.
        params: its parameters.
        prompts: as many as the first model's.
        share: above 0 and below 1: (1 − share)·q + share·p, with p its distribution.
        prefix: what stands before its prompts.
    """

    model: Model
    params: dict
    prompts: Sequence[Sequence[int]]
    share: float
    prefix: Prefix | None = None


def generate(
    model: Model,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    first: int = 0,
    prefix: Prefix | None = None,
    beside: Beside | None = None,
) -> list[list[int]]:
    """Return each prompt's continuation, up to and with the first of `eos_ids`; of an encoder-decoder what it answers.

    The prompts are numbered from `first` on, which their draws go by; a `prefix` stands before every prompt.
    Tokens may be drawn together with a model `beside`.

    Raises:
        UserError: for an empty or over-long prompt, a token outside the vocabulary, or a bad sampling value.
    """
    how = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed, "eos_ids": eos_ids, "first": first}
    blocks = stream(model, params, prompts, **how, prefix=prefix, beside=beside)
    rows: list[list[int]] = [[] for _ in prompts]
    for block in blocks:
        for row, new in zip(rows, block, strict=True):
            row += new
    return rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Where decoding stands: each row's last token, the place of its next one, and how many tokens were chosen.

    Each model has places and a cache of its own.
    """

    token_B: Array
    positions_B: tuple[Array, ...]
    caches: tuple[Cache, ...]
    is_done_B: Array
    number: Array


@dataclass(frozen=True)
class _How:
    """What is compiled: the models, and how tokens are chosen of what they say."""

    models: tuple[Model, ...]
    share: float
    sampling: Sampling
    eos_ids: tuple[int, ...]


def stream(
    model: Model,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    first: int = 0,
    prefix: Prefix | None = None,
    beside: Beside | None = None,
) -> Iterator[list[list[int]]]:
    """Yield each prompt's next tokens, at most `BLOCK` a time and none after its end; then the next ones.

    A draw depends on the seed, the prompt's number (`first` and after) and the step alone. What all prompts begin with
    is computed once; a `prefix` stands before that. What stands before a gist in prompts is compressed in one pass.
    Tokens may be drawn together with a model `beside`.

    Raises:
        UserError: as `generate` does.
    """
    sampling.check()
    if not prompts:
        return
    asked = [Beside(model, params, prompts, 1.0, prefix), *([] if beside is None else [beside])]
    trees, views, prefixes = zip(*(_read(one, max_new_tokens) for one in asked), strict=True)
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(first + jnp.arange(len(prompts)))
    how = _How(tuple(one.model for one in asked), asked[-1].share, sampling, tuple(eos_ids))
    state = _prefill(how, max_new_tokens, trees, views, prefixes, keys_B)
    new_BN, is_over_B, number = np.asarray(state.token_B)[:, None], np.zeros(len(prompts), bool), 1
    while True:
        yield [[] if over else _until_eos(new, eos_ids) for new, over in zip(new_BN.tolist(), is_over_B, strict=True)]
        is_over_B = np.asarray(state.is_done_B)
        if is_over_B.all() or number == max_new_tokens:
            return
        state, block_BN = _decode(how, max_new_tokens, trees, state, keys_B)
        new_BN, number = np.asarray(block_BN)[:, : int(state.number) - number], int(state.number)


def _read(asked: Beside, max_new_tokens: int) -> tuple[dict, View, Prefix | None]:
    """Return a model's parameters as decoding takes them, its view of its prompts, and what stands before all of them.

    Raises:
        UserError: as `check_prompts` does, or for a gist behind a prefix.
    """
    model, params = asked.model, asked.params
    prompts, prefix = _behind_gists(model, params, asked.prompts, asked.prefix)
    held = slots(params) + (0 if prefix is None else prefix.tokens)
    check_prompts(model, prompts, max_new_tokens, held)
    prefix, params = _standing(model, params, prefix), bare(params)
    params = jax.tree_util.tree_map_with_path(partial(_cast_matrix, model.dtype), params)
    if model.config.encoder_layers:
        start = left_padded([[model.config.start_token]] * len(prompts), unit=1)
        return params, replace(start, encoder=left_padded(prompts, PROMPT_UNIT)), prefix
    shared = _shared(model, prompts)
    prefix = prefix_of(model, params, shared, prefix) if shared else prefix
    return params, left_padded([prompt[len(shared) :] for prompt in prompts], PROMPT_UNIT), prefix


def texts(
    blocks: Iterable[Sequence[Sequence[int]]],
    rows: int,
    decode: Callable[[list[int]], str],
    *,
    stop: Sequence[str],
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> Iterator[tuple[int, str, int, bool]]:
    """Yield, as blocks of tokens come, a row, its `settled` text, its tokens so far and whether it is over.

    It ends once all rows are over.
    """
    said: list[list[int]] = [[] for _ in range(rows)]
    is_over = [False] * rows
    for block in blocks:
        for row in [row for row in range(rows) if not is_over[row]]:
            said[row] += block[row]
            is_last = len(said[row]) == max_new_tokens or said[row][-1] in eos_ids
            text, is_over[row] = settled(decode(said[row]), stop, is_last)
            yield row, text, len(said[row]), is_over[row]
        if all(is_over):
            return


def settled(text: str, stop: Sequence[str], is_over: bool) -> tuple[str, bool]:
    """Return what of a text no further token changes, and whether it is at its end: before the first of `stop`.

    Held back are the last character while bytes of it are missing, and what a stop string may begin with.
    """
    found = [text.index(end) for end in stop if end in text]
    if found:
        return text[: min(found)], True
    if is_over:
        return text, True
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    held = [size for end in stop for size in range(1, len(end)) if text.endswith(end[:size])]
    return text[: len(text) - max(held, default=0)], False


def _behind_gists(
    model: Model, params: dict, prompts: Sequence[Sequence[int]], prefix: Prefix | None
) -> tuple[Sequence[Sequence[int]], Prefix | None]:
    """Return what follows the gist of each prompt, and the gists as a prefix; both as given where there is no gist."""
    parts = gists.parted(prompts, gists.places(params)) if gists.places(params) else None
    if parts is None:
        return prompts, prefix
    if prefix is not None:
        raise UserError("the prompts have a gist, and a prefix was given, which it has not seen; leave out one")
    return parts[1], compressed(model, params, parts[0])


def check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, held: int = 0) -> None:
    """Check that a model can go on with prompts behind a prefix of `held` tokens.

    Raises:
        UserError: an encoder, an empty or over-long prompt, a token outside the vocabulary, no token asked for.
    """
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
        if not model.config.encoder_layers and held + len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens{f' behind a prefix of {held}' if held else ''} and "
                f"{max_new_tokens} new ones were asked for; "
                f"the model holds {limit} positions: shorten the prompt or lower max_new_tokens"
            )


def _shared(model: Model, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return what several prompts all begin with, a token of each left over; nothing where a model takes no prefix."""
    if len(prompts) == 1 or model.config.why_no_prefix:
        return []
    shortest = min(prompts, key=len)
    differ = (n for n, token in enumerate(shortest) if any(prompt[n] != token for prompt in prompts))
    same = min(next(differ, len(shortest)), len(shortest) - 1)
    return shortest[: same // PROMPT_UNIT * PROMPT_UNIT]


def _until_eos(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    end = next((at + 1 for at, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tokens[:end]


_standing = jax.jit(Model.standing, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    how: _How,
    max_new_tokens: int,
    params: tuple[dict, ...],
    views: tuple[View, ...],
    prefixes: tuple[Prefix | None, ...],
    keys_B: Array,
) -> _State:
    """Return the state once the prompts are read and their first tokens are chosen.

    Slots for the prefix are left free before the prompts', and filled with it afterwards.
    """
    held = [0 if prefix is None else prefix.tokens for prefix in prefixes]
    empty = tuple(
        replace(model.empty_cache(rows, more + width + max_new_tokens), used=jnp.int32(more))
        for model, more, (rows, width) in zip(how.models, held, (view.tokens_BT.shape for view in views), strict=True)
    )
    token_B, caches = _next(how, params, views, empty, keys_B, 0, prefixes)
    caches = tuple(
        cache if prefix is None else _spread(prefix, cache, jnp.argmax(jnp.asarray(view.segment_BT) > 0, axis=1))
        for prefix, cache, view in zip(prefixes, caches, views, strict=True)
    )
    ends_B = tuple(jnp.asarray(view.position_BT)[:, -1] + 1 + more for view, more in zip(views, held, strict=True))
    return _State(token_B, ends_B, caches, _is_end(token_B, how.eos_ids), jnp.int32(1))


def _spread(prefix: Prefix, cache: Cache, first_B: Array) -> Cache:
    """Return the cache with the prefix in the slots before each row's prompt, which padding may have: from `first_B`.

    So slots are apart what positions are, which windows and biases go by.
    """
    rows_B1, slots_BP = jnp.arange(len(first_B))[:, None], first_B[:, None] + jnp.arange(prefix.tokens)[None]

    def filled(old_LBSGK: Array, new_LBPGK: Array) -> Array:
        return old_LBSGK.at[:, rows_B1, slots_BP].set(new_LBPGK.astype(old_LBSGK.dtype))

    own = filled(cache.own[0], prefix.k_LBPGK), filled(cache.own[1], prefix.v_LBPGK)
    return replace(cache, own=own, segment_BS=cache.segment_BS.at[rows_B1, slots_BP].set(1))


@partial(jax.jit, static_argnums=0, donate_argnames="state")
def _decode(how: _How, most: Array, params: tuple[dict, ...], state: _State, keys_B: Array) -> tuple[_State, Array]:
    """Return the state some tokens on, and these, [B, BLOCK]: up to `most` in all, fewer once all rows have ended."""
    start = state.number

    def goes_on(carry: tuple[_State, Array]) -> Array:
        state, _ = carry
        return (state.number < jnp.minimum(start + BLOCK, most)) & ~state.is_done_B.all()

    def one_more(carry: tuple[_State, Array]) -> tuple[_State, Array]:
        state, tokens_BN = carry
        token_B1 = state.token_B[:, None]
        views = tuple(View(token_B1, jnp.ones_like(token_B1), at_B[:, None]) for at_B in state.positions_B)
        token_B, caches = _next(how, params, views, state.caches, keys_B, state.number)
        tokens_BN = jax.lax.dynamic_update_slice_in_dim(tokens_BN, token_B[:, None], state.number - start, axis=1)
        is_done_B, after_B = state.is_done_B | _is_end(token_B, how.eos_ids), tuple(at + 1 for at in state.positions_B)
        return _State(token_B, after_B, caches, is_done_B, state.number + 1), tokens_BN

    tokens_BN = jnp.zeros((state.token_B.shape[0], BLOCK), jnp.int32)
    return jax.lax.while_loop(goes_on, one_more, (state, tokens_BN))


def _next(
    how: _How,
    params: tuple[dict, ...],
    views: tuple[View, ...],
    caches: tuple[Cache, ...],
    keys_B: Array,
    number: Array | int,
    prefixes: tuple[Prefix | None, ...] | None = None,
) -> tuple[Array, tuple[Cache, ...]]:
    """Return the token that follows each row of the views, and the caches with the views in them."""
    given = zip(how.models, params, views, caches, prefixes or (None,) * len(views), strict=True)
    outputs = [model.apply(tree, view, cache=cache, prefix=prefix) for model, tree, view, cache, prefix in given]
    logits = [
        head_logits(output.hidden_BTD[:, -1], model.head(tree))
        for model, tree, output in zip(how.models, params, outputs, strict=True)
    ]
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
    token_B = choose(logits[0], how.sampling, keys_B) if len(logits) == 1 else _drawn(how, logits, keys_B)
    return token_B, tuple(output.cache for output in outputs)


def _drawn(how: _How, logits: list[Array], keys_B: Array) -> Array:
    """Return a token for each row of what two models say together at the temperature, (1 − share)·q + share·p."""
    real = how.models[0].config.vocab_size
    log_BV, other_BV = (jax.nn.log_softmax(x_BV[:, :real] / how.sampling.temperature) for x_BV in logits)
    mixed_BV = jnp.logaddexp(log_BV + math.log1p(-how.share), other_BV + math.log(how.share))
    return choose(mixed_BV, replace(how.sampling, temperature=1.0), keys_B)


def _is_end(token_B: Array, eos_ids: tuple[int, ...]) -> Array:
    return jnp.isin(token_B, jnp.array(eos_ids, jnp.int32))


def _cast_matrix(dtype: str, path: Any, leaf: Array) -> Array:
    """Return a matrix in the compute dtype, cast once and not in every step; norms stay as they are."""
    return leaf.astype(dtype) if getattr(path[-1], "key", None) in ("kernel", "embedding") else leaf
