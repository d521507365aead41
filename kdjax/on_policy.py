"""Batches that the student answers anew while it trains (on-policy); what to learn of them the teacher says.

Paper: Agarwal et al. 2023, GKD, arXiv:2306.13649, algorithm 1; with a prompted teacher arXiv:2602.12275.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kdjax import data
from kdjax.generate import generate
from kdjax.job import Job
from kdjax.shapes import Batch
from kdjax.step import TrainState, student_params

UNIT = 8
"""Prompts are filled up to a multiple of this, so that few shapes are compiled."""


def is_students(job: Job, step: int) -> bool:
    """Return whether the student answers the batch after so many steps; by the seed alone, in a share λ of them."""
    share = job.config.answers.student_share
    return bool(share) and np.random.default_rng([job.config.seed, step]).random() < share


def reanswered(job: Job, state: TrainState, frozen: Any, batch: Batch, step: int) -> Batch:
    """Return the batch with the student's own answers to its prompts, which it gives behind its own view.

    A draw depends on the seed, the step and the example's place in the batch alone.
    """
    rows = data.rows_of(batch)
    prompts = [one.student for one in data.examples_of(rows)]
    answers, params = job.config.answers, student_params(job.recipe, state.params, frozen)
    seed = int(np.random.SeedSequence([answers.seed, step]).generate_state(1)[0] >> 1)
    how: Any = {"max_new_tokens": answers.tokens, "sampling": answers.sampling, "eos_ids": job.tokenizer.eos_ids}
    filled = prompts + prompts[-1:] * (-len(prompts) % UNIT)
    said = generate(job.student.model, params, filled, seed=seed, **how)
    return data.reanswered(rows, said[: len(prompts)])
