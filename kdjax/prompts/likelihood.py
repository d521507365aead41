"""Log-probabilities of answers after prompts, in large batches: rows by length, the head at the answers' tokens alone.

A row is read once for all answers that it holds: those of one token after the same prompt share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kdjax.losses import head_logits
from kdjax.losses.logits import log_sum_exp, vocabulary
from kdjax.models import Model
from kdjax.shapes import Array, View

Tokens = tuple[int, ...]
Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a prompt, and of an answer."""

NARROWEST = 32
"""Tokens of the narrowest batch; the others are wider by factors of 3/2 and 4/3 in turn."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Asked:
    """A batch: what is read, and of which tokens the log-probability after which place of a row is asked."""

    view: View
    rows_BR: Array
    tokens_BRP: Array


def log_probs(model: Model, params: Any, asked: Asked) -> Array:
    """Return log_probs_BRP of the tokens asked for, float32; logits exist for one place of each row at a time."""
    hidden_BTD, head = model.apply(params, asked.view).hidden_BTD, model.head(params)
    hidden_BRD = jnp.take_along_axis(hidden_BTD, asked.rows_BR[:, :, None], axis=1)
    over = vocabulary(head)

    def at(place: tuple[Array, Array]) -> Array:
        hidden_BD, tokens_BP = place
        logits_BV = head_logits(hidden_BD, head)
        return over.pick(logits_BV, tokens_BP) - log_sum_exp(logits_BV, over)[:, None]

    # R goes in front and not into one axis with B, which is split over devices.
    log_probs_RBP = lax.map(at, (hidden_BRD.swapaxes(0, 1), asked.tokens_BRP.swapaxes(0, 1)))
    return log_probs_RBP.swapaxes(0, 1)


def log_likelihoods(
    run: Callable[[Asked], Array], pairs: Sequence[Pair], *, batch_tokens: int, most: int, unit: int = 1
) -> list[float]:
    """Return the summed log-probability (nats) of each answer after its prompt.

    Args:
        run: the placed `log_probs`.
        pairs: prompts and answers, none of them empty.
        batch_tokens: about so many are read at once.
        most: tokens that a row may have.
        unit: a batch has a multiple of so many rows.
    """
    contexts, row_of = merged([(*prompt, *answer[:-1]) for prompt, answer in pairs])
    asked: list[dict[int, list[int]]] = [{} for _ in contexts]
    for (prompt, answer), row in zip(pairs, row_of, strict=True):
        for place, token in enumerate(answer, len(prompt) - 1):
            known = asked[row].setdefault(place, [])
            known += [] if token in known else [token]
    found: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    for numbers, width in batches(contexts, batch_tokens, most, unit):
        batch = in_batch([(contexts[n], asked[n]) for n in numbers], power(len(numbers), unit), width)
        for number, log_probs_RP in zip(numbers, np.asarray(run(batch)), strict=False):
            for (place, tokens), log_probs_P in zip(asked[number].items(), log_probs_RP.tolist(), strict=False):
                found[number] |= {(place, token): value for token, value in zip(tokens, log_probs_P, strict=False)}
    return [
        sum(found[row][place, token] for place, token in enumerate(answer, len(prompt) - 1))
        for (prompt, answer), row in zip(pairs, row_of, strict=True)
    ]


def merged(contexts: Sequence[Tokens]) -> tuple[list[Tokens], list[int]]:
    """Return the contexts that begin no other one, and for each given one the number of a kept one that begins so."""
    kept: list[Tokens] = []
    row: dict[Tokens, int] = {}
    for context in sorted(set(contexts), reverse=True):  # what begins with a context comes right before it
        if not kept or kept[-1][: len(context)] != context:
            kept.append(context)
        row[context] = len(kept) - 1
    return kept, [row[context] for context in contexts]


def batches(contexts: Sequence[Tokens], batch_tokens: int, most: int, unit: int) -> Iterator[tuple[list[int], int]]:
    """Yield the numbers of rows that are read together and their width, the longest first."""
    by_width: dict[int, list[int]] = {}
    for number in sorted(range(len(contexts)), key=lambda number: -len(contexts[number])):
        by_width.setdefault(min(padded(len(contexts[number])), most), []).append(number)
    for width, numbers in by_width.items():
        rows = unit
        while 2 * rows * width <= batch_tokens:
            rows *= 2
        yield from ((numbers[first : first + rows], width) for first in range(0, len(numbers), rows))


def padded(length: int) -> int:
    """Return the width of the narrowest batch that so many tokens fit into."""
    width = NARROWEST
    while width < length:
        width = width * 4 // 3 if width & (width - 1) else width * 3 // 2
    return width


def power(count: int, unit: int = 1) -> int:
    """Return the least of unit, 2·unit, 4·unit, … that is not below a number: few shapes are compiled."""
    size = unit
    while size < count:
        size *= 2
    return size


def in_batch(rows: Sequence[tuple[Tokens, dict[int, list[int]]]], count: int, width: int) -> Asked:
    """Return `count` rows of so many tokens, the last ones empty."""
    places = power(max(len(wanted) for _, wanted in rows))
    picks = power(max(len(tokens) for _, wanted in rows for tokens in wanted.values()))
    tokens_BT, segment_BT = np.zeros((2, count, width), np.int32)
    rows_BR, tokens_BRP = np.zeros((count, places), np.int32), np.zeros((count, places, picks), np.int32)
    for number, (row, wanted) in enumerate(rows):
        tokens_BT[number, : len(row)], segment_BT[number, : len(row)] = row, 1
        rows_BR[number, : len(wanted)] = list(wanted)
        for at, tokens in enumerate(wanted.values()):
            tokens_BRP[number, at, : len(tokens)] = tokens
    position_BT = np.arange(width, dtype=np.int32)[None] * segment_BT
    return Asked(View(tokens_BT, segment_BT, position_BT), rows_BR, tokens_BRP)
