"""Batches that the student answers anew while it trains (on-policy); what to learn of them the teacher says.

Papers: Agarwal et al. 2023, GKD, arXiv:2306.13649, algorithm 1; with a prompted teacher arXiv:2602.12275; answers drawn
together with the teacher: Gu et al. 2023, MiniLLM, arXiv:2306.08543, section 2.2.
"""

from __future__ import annotations

import base64
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import numpy as safetensors

from kdjax import data
from kdjax.generate import Beside, generate
from kdjax.job import Job
from kdjax.shapes import Batch, Drawn
from kdjax.step import TrainState, student_params, taught_by

UNIT = 8
"""Prompts are filled up to a multiple of this, so that few shapes are compiled."""

DRAWN = "drawn"
"""Of a saved position of the data: the answers that steps after it learn from once more."""


class Turn(NamedTuple):
    """What a step trains on.

    Attributes:
        batch: this process's rows.
        after: where the data goes on, as JSON.
        is_own: whether the student has answered it.
        seconds: that drawing the answers took; 0 where none were drawn.
    """

    batch: Batch
    after: dict[str, Any]
    is_own: bool
    seconds: float


def figures_of(job: Job, turn: Turn) -> dict[str, float]:
    """Return what a step logs of it: whether the student wrote the answers, and the seconds of drawing them."""
    if not job.config.answers.student_share:
        return {}
    return {"own_share": float(turn.is_own), "generation_seconds": turn.seconds}


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return of a run's rows the share of the compared tokens that the student wrote, and the seconds of drawing them.

    Nothing where no row tells.
    """
    told = [row for row in rows if "own_share" in row]
    if not told:
        return {}
    tokens = sum(row["kd_tokens"] for row in told)
    own = sum(row["own_share"] * row["kd_tokens"] for row in told)
    return {
        "own_share": own / max(tokens, 1),
        "generation_seconds": sum(row["generation_seconds"] for row in told),
        "steps_seconds": sum(row["seconds"] for row in told),
    }


def is_students(job: Job, step: int) -> bool:
    """Return whether the student answers the batch after so many steps; by the seed alone, in a share λ of them.

    Steps that learn from one draw go together.
    """
    own = job.config.answers
    at = step // own.reuse
    return bool(own.student_share) and np.random.default_rng([job.config.seed, at]).random() < own.student_share


def take(job: Job, batches: Iterator[tuple[Batch, Any]], state: TrainState, frozen: Any, step: int, at: Any) -> Turn:
    """Return what the step after so many trains on: the next batch, that with the student's answers, or the last again.

    Args:
        job: the run's.
        batches: of the data, with where it goes on after each.
        state: before the step.
        frozen: the trees that are not trained.
        step: how many steps were done.
        at: where the data goes on now; of steps that learn once more from a draw it holds that.
    """
    own, is_own = job.config.answers, is_students(job, step)
    if is_own and step % own.reuse and at and DRAWN in at:
        return Turn(_of_text(at[DRAWN]), at, True, 0.0)
    batch, after = next(batches)
    if not is_own:
        return Turn(batch, after, False, 0.0)
    jax.block_until_ready(state)  # drawing would wait for the step before, whose time this is not
    began = time.perf_counter()
    batch = reanswered(job, state, frozen, batch, step)
    after = after | {DRAWN: _as_text(batch)} if own.reuse > 1 else after
    return Turn(batch, after, True, time.perf_counter() - began)


def reanswered(job: Job, state: TrainState, frozen: Any, batch: Batch, step: int) -> Batch:
    """Return the batch with the student's own answers to its prompts, which it gives behind its own view.

    The teacher has the share of each draw that it is given. A draw depends on the seed, the step and the example's
    place in the batch alone.
    """
    rows, answers = data.rows_of(batch), job.config.answers
    examples = data.examples_of(rows)
    asked = examples + examples[-1:] * (-len(examples) % UNIT)
    params, beside = student_params(job.recipe, state.params, frozen), None
    if answers.teacher_share:
        frozen = taught_by(job.recipe, state, frozen)
        prompts, prefix = [one.teacher for one in asked], frozen.get("teacher_prefix")
        teacher: Any = job.teacher
        beside = Beside(teacher.model, frozen["teacher"], prompts, answers.teacher_share, prefix)
    seed = int(np.random.SeedSequence([answers.seed, step]).generate_state(1)[0] >> 1)
    how: Any = {"max_new_tokens": answers.tokens, "sampling": answers.sampling, "eos_ids": job.tokenizer.eos_ids}
    said = generate(job.student.model, params, [one.student for one in asked], seed=seed, beside=beside, **how)
    batch = data.reanswered(rows, said[: len(examples)])
    if not _weighs(job):
        return batch
    likely = job.likely(state.params, *job.given(frozen, batch))
    return replace(batch, drawn=Drawn(*job.place.own_rows(likely)))


def _weighs(job: Job) -> bool:
    """Return whether tokens weigh by how likely they were when they were drawn."""
    own = job.config.answers
    by_samples = any(term.weighed_by_samples for term in job.recipe.objective.all_terms)
    return by_samples and bool(own.reuse > 1 or own.teacher_share)


def _as_text(batch: Batch) -> str:
    """Return a batch of answers as a text that JSON holds."""
    rows = data.rows_of(batch)
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    if batch.drawn is not None:
        arrays |= {f"{DRAWN}.{name}": x_BR for name, x_BR in batch.drawn._asdict().items()}
    return base64.b85encode(zlib.compress(safetensors.save(arrays), 1)).decode()


def _of_text(text: str) -> Batch:
    arrays = safetensors.load(zlib.decompress(base64.b85decode(text)))
    drawn = {name.removeprefix(f"{DRAWN}."): arrays.pop(name) for name in list(arrays) if name.startswith(f"{DRAWN}.")}
    count = len(arrays["tokens"])
    batch = data.answered([{name: x_BT[row] for name, x_BT in arrays.items()} for row in range(count)])
    return replace(batch, drawn=Drawn(**drawn)) if drawn else batch
