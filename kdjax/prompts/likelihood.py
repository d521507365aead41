"""Log-probabilities of answers after prompts, in large batches: rows by length, the head at the answers' tokens alone.

A row is read once for all answers that it holds: those of one token after the same prompt share it. What many rows
begin with, as a candidate's worked examples, is read once for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kdjax.losses import head_logits
from kdjax.losses.logits import log_sum_exp, vocabulary
from kdjax.models import Model, Prefix
from kdjax.shapes import Array, View

Tokens = tuple[int, ...]
Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a prompt, and of an answer."""
Group = tuple[int, int, int]
"""The first of some sorted rows, the first one after them, and how many tokens they are read behind."""

NARROWEST = 32
"""Tokens of the narrowest batch; the others are wider by factors of 3/2 and 4/3 in turn."""
LEAST_SHARED, LEAST_ROWS = 64, 4
"""Tokens that so many rows begin with before they are read once for all of them: each such length is compiled anew."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Asked:
    """A batch: what is read, and of which tokens the log-probability after which place of a row is asked."""

    view: View
    rows_BR: Array
    tokens_BRP: Array


def log_probs(model: Model, params: Any, prefix: Prefix | None, asked: Asked) -> Array:
    """Return log_probs_BRP of the tokens asked for, float32; logits exist for one place of each row at a time."""
    hidden_BTD, head = model.apply(params, asked.view, prefix=prefix).hidden_BTD, model.head(params)
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
    run: Callable[[Tokens, Asked], Array],
    pairs: Sequence[Pair],
    *,
    batch_tokens: int,
    most: int,
    unit: int = 1,
    shares: bool = True,
) -> list[float]:
    """Return the summed log-probability (nats) of each answer after its prompt.

    Args:
        run: the placed `log_probs`, given what stands before all rows of the batch: nothing, or tokens.
        pairs: prompts and answers, none of them empty.
        batch_tokens: about so many are read at once.
        most: tokens that a row may have.
        unit: a batch has a multiple of so many rows.
        shares: whether what many rows begin with may be read once for all of them.
    """
    contexts, row_of = merged([(*prompt, *answer[:-1]) for prompt, answer in pairs])
    asked: list[dict[int, list[int]]] = [{} for _ in contexts]
    for (prompt, answer), row in zip(pairs, row_of, strict=True):
        for place, token in enumerate(answer, len(prompt) - 1):
            known = asked[row].setdefault(place, [])
            known += [] if token in known else [token]
    found: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    begins = [context[: min(places)] if shares else () for context, places in zip(contexts, asked, strict=True)]
    for shared, group in shared_beginnings(begins):
        held, rest = len(shared), [contexts[number][len(shared) :] for number in group]
        for picks, width in batches(rest, batch_tokens, most - held, unit, held):
            rows = [(rest[n], {place - held: wanted for place, wanted in asked[group[n]].items()}) for n in picks]
            log_probs_BRP = np.asarray(run(shared, in_batch(rows, power(len(picks), unit), width)))
            for n, log_probs_RP in zip(picks, log_probs_BRP, strict=False):
                for (place, tokens), log_probs_P in zip(asked[group[n]].items(), log_probs_RP.tolist(), strict=False):
                    found[group[n]] |= {(place, token): x for token, x in zip(tokens, log_probs_P, strict=False)}
    return [
        sum(found[row][place, token] for place, token in enumerate(answer, len(prompt) - 1))
        for (prompt, answer), row in zip(pairs, row_of, strict=True)
    ]


def shared_beginnings(begins: Sequence[Tokens]) -> Iterator[tuple[Tokens, list[int]]]:
    """Yield what rows are read behind, and their numbers, each once; those that share too little behind nothing."""
    order = sorted(range(len(begins)), key=lambda number: begins[number])
    rows = [begins[number] for number in order]
    held = [0, *(_held(_common(a, b)) for a, b in itertools.pairwise(rows))]
    alone: list[int] = []
    for first, end, shared in _groups([len(row) for row in rows], held, 0, len(rows))[1]:
        if shared:
            yield rows[first][:shared], order[first:end]
        else:
            alone += order[first:end]
    if alone:
        yield (), alone


def _groups(lengths: Sequence[int], held: Sequence[int], first: int, end: int) -> tuple[int, list[Group]]:
    """Return the tokens that are read of some sorted rows, and how: all behind the same, or apart where they differ.

    Args:
        lengths: of all rows.
        held: how many tokens each shares with the one before it.
        first: the first of the rows.
        end: the first one after them.
    """
    read = sum(lengths[first:end])
    if end - first < LEAST_ROWS:
        return read, [(first, end, 0)]
    least = min(held[first + 1 : end])
    cuts = [first, *(n for n in range(first + 1, end) if held[n] == least), end]
    together = read - least * (end - first - 1), [(first, end, least)]
    if len(cuts) - 2 == end - first - 1:
        return together
    parts = [_groups(lengths, held, *cut) for cut in itertools.pairwise(cuts)]
    apart = sum(part[0] for part in parts), [group for part in parts for group in part[1]]
    return min(together, apart, key=lambda found: found[0])


def _common(a: Tokens, b: Tokens) -> int:
    """Return how many tokens two texts begin with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _held(length: int) -> int:
    """Return how many of so many tokens are read once: one of a few lengths, at most an eighth or 32 fewer."""
    unit = max(NARROWEST, (1 << length.bit_length()) // 16)
    return length // unit * unit if length >= LEAST_SHARED else 0


def merged(contexts: Sequence[Tokens]) -> tuple[list[Tokens], list[int]]:
    """Return the contexts that begin no other one, and for each given one the number of a kept one that begins so."""
    kept: list[Tokens] = []
    row: dict[Tokens, int] = {}
    for context in sorted(set(contexts), reverse=True):  # what begins with a context comes right before it
        if not kept or kept[-1][: len(context)] != context:
            kept.append(context)
        row[context] = len(kept) - 1
    return kept, [row[context] for context in contexts]


def batches(
    contexts: Sequence[Tokens], batch_tokens: int, most: int, unit: int, behind: int = 0
) -> Iterator[tuple[list[int], int]]:
    """Yield the numbers of rows that are read together and their width, the longest first.

    Of the tokens that they are read `behind`, eight take the memory of one that is read.
    """
    by_width: dict[int, list[int]] = {}
    for number in sorted(range(len(contexts)), key=lambda number: -len(contexts[number])):
        by_width.setdefault(min(padded(len(contexts[number])), most), []).append(number)
    for width, numbers in by_width.items():
        rows = unit
        while 2 * rows * (width + behind // 8) <= batch_tokens:
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
