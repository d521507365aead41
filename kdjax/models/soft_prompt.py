"""Soft prompts: a few trained vectors before every example of a model that is frozen otherwise.

They are one branch of a model's parameters, which `Model.apply` makes a prefix of: in a prompt (Lester et al. 2021,
arXiv:2104.08691) they stand in the place of embeddings, in a prefix (Li & Liang 2021, arXiv:2101.00190; Liu et al.
2021, arXiv:2110.07602) they are the keys and values of every layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError
from kdjax.models.config import GIST, SOFT_PROMPT, ModelConfig, SoftPrompt
from kdjax.models.layers import INIT_STD
from kdjax.models.transformer import Model
from kdjax.shapes import Array

Tree = dict[str, Any]

SHAPES = {
    "prompt": lambda c, tokens: {"embedding": (tokens, c.width)},
    "prefix": lambda c, tokens: dict.fromkeys("kv", (c.layers, tokens, c.kv_heads, c.head_width)),
}
"""Kind -> the shapes of its leaves."""


def slots(tree: Tree) -> int:
    """Return how many tokens the soft prompt of a model takes; 0 where its parameters have none."""
    for name, leaf in tree.get(SOFT_PROMPT, {}).items():
        return leaf.shape[0 if name == "embedding" else 1]
    return 0


def axes_of(model: Model, tree: Tree) -> Tree:
    """Return the names of all parameters' axes: of a soft prompt or a gist among them every device has all."""
    own = {
        branch: {name: (None,) * len(leaf.shape) for name, leaf in tree[branch].items()}
        for branch in (SOFT_PROMPT, GIST)
        if branch in tree
    }
    return model.logical_axes() | own


def check_fits(own: Tree, config: ModelConfig, source: str) -> None:
    """Check that a soft prompt is of such a model.

    Raises:
        UserError: it is not, or the model takes none.
    """
    config.check_prefix()
    got = {name: tuple(leaf.shape) for name, leaf in own.items()}
    wanted = [make(config, slots({SOFT_PROMPT: own})) for make in SHAPES.values()]
    if got not in wanted:
        raise UserError(f"the soft prompt of {source} has shapes {got}; its base takes {wanted[0]} or {wanted[1]}")


def text_of(soft: SoftPrompt) -> str:
    """Return the text that a soft prompt starts as, read where it names a file.

    Raises:
        UserError: the file cannot be read, or there is no text.
    """
    text = soft.text
    if text.startswith("@"):
        try:
            text = Path(text[1:]).expanduser().read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise UserError(f"student.soft_prompt.text {text[1:]} cannot be read: {error}") from None
    if not text:
        raise UserError(f"student.soft_prompt.text {soft.text} is empty; write the prompt that it starts as")
    return text


def init_random(soft: SoftPrompt, config: ModelConfig, key: Array) -> Tree:
    """Return a random soft prompt as a branch of a model's parameters, float32; nothing where there is none."""
    if not soft.tokens:
        return {}

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        own = jax.random.fold_in(key, zlib.crc32(f"{SOFT_PROMPT}/{name}".encode()))
        return INIT_STD * jax.random.normal(own, shape, jnp.float32)

    return {SOFT_PROMPT: {name: draw(name, shape) for name, shape in SHAPES[soft.kind](config, soft.tokens).items()}}


def of_tokens(soft: SoftPrompt, model: Model, params: Tree, ids: Sequence[int]) -> Tree:
    """Return the soft prompt that a text's own tokens are, float32: their embeddings, or their keys and values.

    Of a text longer than the soft prompt `kept_of` says which. Keys and values of these are what they were behind all
    of the text, and where positions are rotary, they stand as far from what follows as they did there.
    """
    kept = kept_of(len(ids), soft.tokens)
    ids_P = jnp.asarray(ids, jnp.int32)
    if soft.kind == "prompt":
        return {SOFT_PROMPT: {"embedding": params["embed"]["embedding"][ids_P[kept]].astype(jnp.float32)}}
    ahead = len(ids) - soft.tokens if model.config.positions == "rope" else 0
    whole = model.read(params, ids_P[None], first_position=-ahead)
    k_LPGK, v_LPGK = (x[:, 0, kept].astype(jnp.float32) for x in (whole.k_LBPGK, whole.v_LBPGK))
    return {SOFT_PROMPT: {"k": k_LPGK, "v": v_LPGK}}


def kept_of(length: int, tokens: int) -> np.ndarray:
    """Return which tokens of a text are kept: its last ones, and the first, which attention rests on.

    Paper: Xiao et al. 2023, StreamingLLM, arXiv:2309.17453.
    """
    return np.array([0, *range(length - tokens + 1, length)])
