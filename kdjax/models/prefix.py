"""A prompt -> its keys and values, computed once for all that follows it (`Model.apply`'s `prefix`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from kdjax.errors import UserError
from kdjax.models.attention import Prefix
from kdjax.models.soft_prompt import slots
from kdjax.models.transformer import Model
from kdjax.shapes import Array


def prefix_of(model: Model, params: dict, tokens: Sequence[int], before: Prefix | None = None) -> Prefix:
    """Return the prefix that a prompt is, in the model's compute dtype; with `before`, the two one after the other.

    Where the parameters have a soft prompt it stands before that, and is not in what is returned.

    Raises:
        UserError: no token, one outside the vocabulary, more than the model has positions, or a model that takes none.
    """
    model.config.check_prefix()
    rows, held = (1, 0) if before is None else before.k_LBPGK.shape[1:3]
    held += slots(params)
    limit, vocab_size = model.config.max_positions, model.config.vocab_size
    if not 0 < held + len(tokens) <= limit or not len(tokens):
        raise UserError(f"the prefix has {held + len(tokens)} tokens; wanted from 1 to {limit}, the model's positions")
    if bad := [token for token in tokens if not 0 <= token < vocab_size]:
        raise UserError(f"the prefix has token {bad[0]}, outside the model's vocabulary of {vocab_size}")
    return _computed(model, params, np.tile(np.asarray(tokens, np.int32), (rows, 1)), before)


@partial(jax.jit, static_argnums=0)
def _computed(model: Model, params: dict, tokens_BP: Array, before: Prefix | None) -> Prefix:
    """Return the prefix that equal rows of tokens are, behind `before`."""
    own = model.read(params, tokens_BP, before)
    return own if before is None else before.then(own)
