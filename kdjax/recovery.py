"""How much of what a prompt does is in a student that does not see it, and what that saves; said in summary.json.

recovered = 1 − KL(prompted ‖ distilled) / KL(prompted ‖ unprompted), over all answers' tokens, never clipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax

from kdjax import data
from kdjax.data import Asked
from kdjax.evaluate import evaluate, forward_speed, sums_of
from kdjax.generate import generate
from kdjax.job import Job, of_teacher
from kdjax.losses import ObjectiveConfig, fused_kd_loss
from kdjax.models import Model, bare
from kdjax.models import gist as gists
from kdjax.models.config import SOFT_PROMPT
from kdjax.models.soft_prompt import slots
from kdjax.shapes import Array, Batch, View
from kdjax.step import student_params
from kdjax.teacher import brought, pick_rows, speaking

Figures = dict[str, Any]

DRAWS = 2_000
"""Of the bootstrap."""

BATCH = 8
"""Examples, each in its own row, that are measured at once."""


def recovery(job: Job, params: Any, frozen: Any) -> Figures:
    """Return what summary.json says of a prompt's recovery; nothing where the teacher has no prompt of its own.

    Nor where a cache has what the teacher says: then nobody can be asked. Measured on the held-out answers, and on
    answers that the student gives to the same prompts itself. With a gist also `swapped`: behind the gist of another
    prompt, where what is recovered is of the kind of text and not of the prompt; and `by_gist`, the difference of the
    two with its paired interval.
    """
    teacher = job.teacher
    if teacher is None or not job.runs_teacher or not job.config.data.teacher_view:
        return {}
    if not (held := data.examples_of(job.data.held_out)):
        return {}
    student = student_params(job.recipe, params, frozen)
    plain, distilled = (teacher.model, frozen["teacher"]), (job.student.model, student)
    own, found = _answered(job, *distilled, held), Figures()
    for name, asked in (("recovered", held), ("recovered_own", own)):
        of_plain = _divergences(job, *plain, of_teacher(frozen), _unprompted(asked))
        of_distilled = _divergences(job, *distilled, frozen, asked)
        found |= _shares(name, of_plain, of_distilled)
        if gists.places(student):
            swapped = _divergences(job, *distilled, frozen, _swapped(asked))
            found |= _shares(f"{name}_swapped", of_plain, swapped)
            found |= _shares(f"{name}_by_gist", of_plain, of_plain - (swapped - of_distilled))
    if job.config.answers.behaviour:
        said = {"prompted": held, "unprompted": _answered(job, *plain, _unprompted(held)), "distilled": own}
        found["behaviour"] = {who: _rate(job, answers) for who, answers in said.items()}
    return found | {"forgetting": _forgetting(job, params, frozen), "saved": _saved(job, distilled, held)}


def _unprompted(examples: Sequence[Asked]) -> list[Asked]:
    """Return the examples as a model without prompt and gist sees them."""
    return [replace(one, student=one.unprompted) for one in examples]


def _swapped(examples: Sequence[Asked]) -> list[Asked]:
    """Return the examples, each behind the prompt and gist of one that stands half of all away."""
    heads = [one.student[: len(one.student) - len(one.unprompted)] for one in examples]
    half = len(heads) // 2
    return [
        replace(one, student=[*head, *one.unprompted])
        for one, head in zip(examples, heads[half:] + heads[:half], strict=True)
    ]


def shares(distilled_P: np.ndarray, unprompted_P: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Return 1 − Σ distilled / Σ unprompted, and its 95 % bootstrap interval over prompts (percentiles)."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(distilled_P), (DRAWS, len(distilled_P)))
    values = 1 - distilled_P[drawn].sum(1) / unprompted_P[drawn].sum(1)
    low, high = np.percentile(values, (2.5, 97.5)).tolist()
    return float(1 - distilled_P.sum() / unprompted_P.sum()), (low, high)


def _shares(name: str, unprompted_P: np.ndarray, distilled_P: np.ndarray) -> Figures:
    share, interval = shares(distilled_P, unprompted_P)
    return {name: share, f"{name}_interval": interval, f"{name}_prompts": len(distilled_P)}


def _divergences(job: Job, model: Model, params: Any, frozen: Any, examples: Sequence[Asked]) -> np.ndarray:
    """Return Σ KL(prompted teacher ‖ model without the prompt) over each example's answer, in nats.

    `frozen` has what the teacher's head is made of where `params` lie, if the teacher does not lie there.
    """
    teacher: Any = None if job.teacher is None else job.teacher.model
    head = frozen["teacher_head"] if "teacher_head" in frozen else teacher.head_part(frozen["teacher"])
    found = []
    for first in range(0, len(examples), BATCH):
        some = examples[first : first + BATCH]
        batch = data.in_rows([*some, *[some[-1]] * (BATCH - len(some))])
        batch = replace(batch, signal=jax.device_get(_said(teacher, of_teacher(frozen), batch)))
        found += np.asarray(_sums(model, teacher, params, head, batch))[: len(some)].tolist()
    return np.array(found)


@partial(jax.jit, static_argnums=0)
def _said(teacher: Model, frozen: Any, batch: Batch) -> dict[str, Array]:
    """Return what the teacher says of a batch."""
    return speaking(teacher, {}, 1)(frozen, jax.tree.map(jax.numpy.asarray, batch))


@partial(jax.jit, static_argnums=(0, 1))
def _sums(model: Model, teacher: Model, params: Any, teacher_head: Any, batch: Batch) -> Array:
    """Return the divergence of each row of a batch, summed over its tokens."""
    batch = jax.tree.map(jax.numpy.asarray, batch)
    shape = batch.targets_BR.shape
    hidden_ND = pick_rows(model.apply(params, batch.student).hidden_BTD, batch.student_rows_BR)
    signal: Any = brought(teacher)({"teacher_head": teacher_head}, batch)
    head = model.head(params)

    def of_row(row: tuple[Array, ...]) -> Array:
        hidden_RD, teacher_RD, targets_R, weight_R = row
        told = replace(signal, hidden_ND=teacher_RD, taps={})
        objective = ObjectiveConfig(alpha=0.0)
        return fused_kd_loss(hidden_RD, head, told, targets_R, weight_R, weight_R, objective)[1]["kd"]

    rows = (x_ND.reshape(*shape, -1) for x_ND in (hidden_ND, signal.hidden_ND))
    return lax.map(of_row, (*rows, batch.targets_BR, batch.kd_weight_BR))


def _answered(job: Job, model: Model, params: Any, examples: Sequence[Asked]) -> list[Asked]:
    """Return the examples with what a model answers to the student's view of them."""
    own, said = job.config.answers, []
    how: Any = {"max_new_tokens": own.tokens, "sampling": own.sampling, "seed": own.seed + 1}
    for first in range(0, len(examples), own.batch_size):
        prompts = [one.student for one in examples[first : first + own.batch_size]]
        said += generate(model, params, prompts, eos_ids=job.tokenizer.eos_ids, first=first, **how)
    return [replace(one, answer=ids) for one, ids in zip(examples, said, strict=True)]


def _rate(job: Job, examples: Sequence[Asked]) -> float:
    """Return the share of answers that show the behaviour."""
    pattern = re.compile(job.config.answers.behaviour)
    return float(np.mean([bool(pattern.search(job.tokenizer.decode(one.answer))) for one in examples]))


def _forgetting(job: Job, params: Any, frozen: Any) -> Figures:
    """Return the KL from the unprompted teacher to the student on unrelated text, and on what text."""
    config, teacher = job.config, job.teacher
    if teacher is None or not config.answers.unrelated:
        return {}
    length = config.data.sequence_length
    text = data.DataConfig(sources=config.answers.unrelated, sequence_length=length, eval_tokens=min(16 * length, 4096))
    text = replace(text, eval_fraction=0.5, dedupe_ngram=0)  # none of it is trained on
    loader = data.build(text, job.tokenizer, batch_size=config.batch_size)
    batches = loader.evaluation(config.batch_size)
    alone = {name: tree for name, tree in frozen.items() if name != "teacher_prefix"}
    sums = job.place.compile_sums(partial(sums_of, recipe=replace(job.recipe, objective=ObjectiveConfig())))
    figures = evaluate(lambda given: sums(params, *given), (job.given(alone, batch) for batch in batches))
    return {"kl": figures["kl"], "tokens": figures["tokens"], "held_out_sha256": loader.held_out_hash}


def _saved(job: Job, student: tuple[Model, Any], examples: Sequence[Asked]) -> Figures:
    """Return what a request costs less without the prompt: tokens, bytes of the cache, seconds to the first token."""
    (model, params), c = student, student[0].config
    with_prompt = float(np.mean([len(one.teacher) for one in examples])) + len(job.data.shared)
    without = float(np.mean([len(one.unprompted) for one in examples]))
    if count := gists.places(params):  # a gist is made once, and from then on it is keys and values of its places
        kept = dict.fromkeys("kv", np.zeros((c.layers, count, c.kv_heads, c.head_width), np.float32))
        params = bare(params) | {SOFT_PROMPT: kept}
    seconds = [_seconds(model, bare(params), round(with_prompt)), _seconds(model, params, round(without))]
    without += slots(params)
    per_token = 2 * c.layers * c.kv_heads * c.head_width * jax.numpy.dtype(model.dtype).itemsize
    return {
        "prompt_tokens": with_prompt - without,
        "request_tokens": without,
        "cache_bytes": (with_prompt - without) * per_token,
        "seconds_with": seconds[0],
        "seconds_without": seconds[1],
    }


def _seconds(model: Model, params: Any, tokens: int) -> float:
    """Return how long one prompt of so many tokens takes."""
    ones_1T = np.ones((1, tokens), np.int32)
    return tokens / forward_speed(model, params, View(ones_1T, ones_1T, np.arange(tokens, dtype=np.int32)[None]))
