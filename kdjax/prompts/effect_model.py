"""What a prompt does inside a local model: divergence by position of the answer, and what a request costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kdjax.generate import BLOCK, stream
from kdjax.losses import head_logits
from kdjax.losses.logits import log_softmax, vocabulary
from kdjax.losses.terms import kl_terms
from kdjax.models import Model
from kdjax.prompts.likelihood import Asked, Tokens, batches, in_batch, padded, power
from kdjax.prompts.local import Local
from kdjax.shapes import Array

REPEATS = 5
"""Timings of a request, of which the median counts."""


class Compared(NamedTuple):
    """Of each token of an answer: KL(prompted ‖ unprompted) in nats, and both log-probabilities of the token."""

    kl: list[float]
    prompted: list[float]
    unprompted: list[float]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Both:
    """A batch of the same answers behind the prompt and without it."""

    prompted: Asked
    unprompted: Asked


def divergences(model: Model, params: Any, both: Both) -> Array:
    """Return [3, B, R], float32: what `Compared` has, at each place of the answers.

    The distributions are whole, and exist for one place of each row at a time.
    """
    hidden_BRD, bare_BRD = (_hidden(model, params, asked) for asked in (both.prompted, both.unprompted))
    head = model.head(params)
    over = vocabulary(head)

    def at(place: tuple[Array, Array, Array]) -> Array:
        *hidden, tokens_BP = place
        p_BV, q_BV = (log_softmax(head_logits(hidden_BD, head), over) for hidden_BD in hidden)
        picked = (over.pick(log_probs_BV, tokens_BP)[:, 0] for log_probs_BV in (p_BV, q_BV))
        return jnp.stack([over.sum_V(kl_terms(p_BV, q_BV)), *picked])

    places = (hidden_BRD, bare_BRD, both.prompted.tokens_BRP)
    found_R3B = lax.map(at, tuple(x.swapaxes(0, 1) for x in places))
    return jnp.moveaxis(found_R3B, 0, 2)


def _hidden(model: Model, params: Any, asked: Asked) -> Array:
    return jnp.take_along_axis(model.apply(params, asked.view).hidden_BTD, asked.rows_BR[:, :, None], axis=1)


def compare(local: Local, triples: Sequence[tuple[str, str, str]]) -> list[Compared]:
    """Return what a prompt changes in each token of an answer.

    Args:
        local: the model.
        triples: the prompt, what stands in its place without it, the answer.
    """
    rows = []
    for prompt, bare, answer in triples:
        ids = local.answer_ids(answer)
        rows.append((_asked(local.prompt_ids(prompt), ids), _asked(local.prompt_ids(bare), ids), len(ids)))
    unit, most = local.place.batch_devices, local.model.config.max_positions
    run = local.place.compile_sums(lambda params, _, both: divergences(local.model, params, both))
    found: dict[int, Compared] = {}
    for numbers, width in batches([row[0][0] for row in rows], local.config.batch_tokens, most, unit):
        count = power(len(numbers), unit)
        bare_width = min(most, padded(max(len(rows[number][1][0]) for number in numbers)))
        prompted = in_batch([rows[number][0] for number in numbers], count, width)
        both = Both(prompted, in_batch([rows[number][1] for number in numbers], count, bare_width))
        values = np.asarray(run(local.params, {}, local.place.put_batch(both)))
        found |= {n: Compared(*values[:, at, : rows[n][2]].tolist()) for at, n in enumerate(numbers)}
    return [found[number] for number in range(len(rows))]


def _asked(prompt: Sequence[int], answer: Sequence[int]) -> tuple[Tokens, dict[int, list[int]]]:
    """Return what is read, and of which token the log-probability is asked after which place."""
    return (*prompt, *answer[:-1]), {len(prompt) - 1 + number: [token] for number, token in enumerate(answer)}


def seconds(local: Local, prompts: Sequence[str]) -> list[dict[str, float]]:
    """Return for each prompt, alone in its batch, seconds to the first token (`prefill`) and of each next one.

    Medians over repeats in which the prompts take turns, compilation not counted.
    """
    ids = [local.prompt_ids(prompt) for prompt in prompts]
    timings: list[list[tuple[float, float]]] = [[] for _ in ids]
    for repeat in range(1 + REPEATS):
        for tokens, timed in zip(ids, timings, strict=True):
            one = _timed(local, tokens)
            timed += [one] if repeat else []
    medians = (np.median(np.array(timed), axis=0).tolist() for timed in timings)
    return [{"prefill": prefill, "decode": decode} for prefill, decode in medians]


def _timed(local: Local, tokens: Sequence[int]) -> tuple[float, float]:
    blocks = stream(local.model, local.params, [tokens], max_new_tokens=1 + BLOCK)
    first, rest = (_clocked(lambda: next(blocks)) for _ in range(2))
    return first, rest / BLOCK


def _clocked(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def cache_bytes(model: Model, tokens: int) -> int:
    """Return the bytes of keys and values of so many tokens."""
    cache = jax.eval_shape(lambda: model.empty_cache(1, tokens))
    return sum(x.size * x.dtype.itemsize for x in cache.own)
