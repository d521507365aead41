"""Gisting: prompts that a model has never seen, compressed in one pass to the keys and values of a few places.

The places of a gist are trained vectors behind a prompt, tokens below 0 in a view. What follows them sees them and not
the prompt (`Sight.past_gists`), so their keys and values are all of it that need be kept.
Paper: Mu et al. 2023, Learning to Compress Prompts with Gist Tokens, arXiv:2304.08467.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from kdjax.errors import UserError
from kdjax.models.attention import Prefix
from kdjax.models.config import GIST, ModelConfig
from kdjax.models.layers import INIT_STD
from kdjax.models.model_file import ModelFile, lazy
from kdjax.models.transformer import Model
from kdjax.shapes import Array, View, gist_places, left_padded

Tree = dict[str, Any]

UNIT = 32
"""Prompts are padded to a multiple of this, so that few lengths are compiled."""

AXES = {GIST: {"embedding": (None, None)}}
"""The names of its axes: every device has all of it."""


def places(tree: Tree) -> int:
    """Return how many places the gist of a model has; 0 where its parameters have none."""
    return tree[GIST]["embedding"].shape[0] if GIST in tree else 0


def init_random(count: int, config: ModelConfig, key: Array) -> Tree:
    """Return random vectors as a branch of a model's parameters, float32; nothing where there are to be none."""
    return {GIST: {"embedding": INIT_STD * jax.random.normal(key, (count, config.width))}} if count else {}


def of_vocabulary(count: int, file: ModelFile, seed: int) -> Tree:
    """Return the embeddings of so many random tokens as a branch of a model's parameters, in LazyTensors."""
    ids = np.random.default_rng(seed).choice(file.config.vocab_size, count).tolist()
    table = file.tensors["embed"]["embedding"]
    rows = [table.read((slice(one, one + 1), slice(None))) for one in ids]
    return {GIST: {"embedding": lazy(np.concatenate(rows))}}


def compressed(model: Model, params: Tree, prompts: Sequence[Sequence[int]]) -> Prefix:
    """Return the prefix that the gist of each prompt is, a row each: all that what follows need see of the prompt.

    The places stand at positions 0 and after, the prompt before them: rotary angles go by distances alone.

    Raises:
        UserError: no gist, no token, one outside the vocabulary, or more than the model has positions.
    """
    count, c = places(params), model.config
    if not count:
        raise UserError("the model has no gist to compress a prompt to; train one with student.gist")
    c.check_gist()
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= c.max_positions - count:
            limit = f"wanted from 1 to {c.max_positions - count}, the model's positions before a gist of {count}"
            raise UserError(f"prompt {number} has {len(prompt)} tokens to compress; {limit}")
        if not all(0 <= token < c.vocab_size for token in prompt):
            raise UserError(f"prompt {number} has a token outside the model's vocabulary of {c.vocab_size}")
    view = left_padded([[*prompt, *gist_places(count)] for prompt in prompts], UNIT)
    before_B1 = np.array([[len(prompt)] for prompt in prompts], np.int32)
    return _compressed(model, count, params, replace(view, position_BT=view.position_BT - before_B1))


@partial(jax.jit, static_argnums=(0, 1))
def _compressed(model: Model, count: int, params: Tree, view: View) -> Prefix:
    cache = model.apply(params, view, cache=model.empty_cache(*view.tokens_BT.shape)).cache
    return Prefix(*(x_LBSGK[:, :, -count:] for x_LBSGK in cache.own))


def parted(prompts: Sequence[Sequence[int]], count: int) -> tuple[list[list[int]], list[list[int]]] | None:
    """Return what stands before the gist of each prompt, and what after it; None where no prompt has a gist.

    Raises:
        UserError: a prompt that has none, or not all places of one in a row, where others have.
    """
    if not any(token < 0 for prompt in prompts for token in prompt):
        return None
    before, after, marks = [], [], gist_places(count)
    for number, prompt in enumerate(prompts):
        at = [place for place, token in enumerate(prompt) if token < 0]
        if not at or list(prompt[at[0] : at[-1] + 1]) != marks:
            raise UserError(f"prompt {number} has {len(at)} places of a gist; wanted all {count} once, in a row")
        before.append(list(prompt[: at[0]]))
        after.append(list(prompt[at[-1] + 1 :]))
    return before, after
