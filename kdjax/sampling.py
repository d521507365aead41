"""How the next token is chosen from its logits, and who answers the prompts of a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.shapes import Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Choose among so many likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens that hold this probability together."""
    min_p: float = 0.0
    """Choose among tokens whose probability is at least this share of the likeliest's.

    Paper: Nguyen et al. 2024, Min-p Sampling, arXiv:2407.01082, section 3.
    """

    def check(self) -> None:
        """Check the ranges.

        Raises:
            UserError: for a value outside its range.
        """
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; wanted 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; wanted 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; wanted above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; wanted from 0 (all tokens) to 1")


LEAST = {"count": 0, "tokens": 1, "batch_size": 1, "seed": 0, "student_share": 0, "teacher_share": 0, "reuse": 1}
"""The lowest value of each number of `AnswersConfig`."""


@dataclass(frozen=True)
class AnswersConfig:
    """Who answers prompts, how, and what is looked at in the answers."""

    by: Literal["data", "teacher"] = "data"
    """data: the column of answers; teacher: sampled once from the teacher behind its own view, and kept in the run
    directory as answers.jsonl, which may be read and edited."""
    student_share: float = 0.0
    """Share of the batches that the student answers anew while it trains (on-policy; λ of arXiv:2306.13649)."""
    teacher_share: float = 0.0
    """Of what the student's answers are drawn from, the teacher's share: (1 − share)·student + share·teacher at each
    token (0.2 in MiniLLM, arXiv:2306.08543). Terms that go by samples weigh each token for it."""
    reuse: int = 1
    """Steps that learn from each batch of the student's answers. Terms that go by samples weigh each token by how
    likely the student of the step makes it, over how likely it was when it was drawn."""
    clip_ratio: float = 0.2
    """How far from 1 that ratio goes, as in PPO; only of answers that are used again."""
    count: int = 0
    """So many prompts are answered, chosen by a hash of theirs; 0 is all."""
    tokens: int = 64
    """Tokens of an answer, at most."""
    sampling: Sampling = Sampling(temperature=1.0)
    """How the teacher's tokens and the student's are chosen."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer of the teacher ends, for models that do not end it themselves."""
    only: str = ""
    """A regular expression: an answer of the teacher that does not have it is dropped, and counted in answers.json."""
    scratchpad: str = ""
    """A text with which the teacher ends its thoughts, `Answer:` for example: what it wrote up to there becomes the
    column `scratchpad`, for the teacher's view; what follows is the answer. Others are dropped (arXiv:2209.15189)."""
    behaviour: str = ""
    """A regular expression for what the teacher's prompt asks for; the share of answers that have it is measured."""
    unrelated: tuple[str, ...] = ("python_docs",)
    """Sources of plain text on which forgetting is measured, as the divergence from the unprompted teacher."""
    batch_size: int = 32
    """Prompts that are answered at once."""
    seed: int = 0
    """Of the choice of prompts and of the answers."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"answers.{name} is {getattr(self, name)}; wanted at least {least}")
        if "" in self.stop:
            raise UserError(f"answers.stop is {self.stop}; wanted texts that are not empty")
        if self.student_share > 1:
            raise UserError(f"answers.student_share is {self.student_share}; wanted from 0 to 1")
        if self.teacher_share >= 1 or not self.clip_ratio > 0:
            raise UserError(
                f"answers.teacher_share is {self.teacher_share} and answers.clip_ratio is {self.clip_ratio}; wanted a "
                "share below 1, and a ratio above 0"
            )
        if (self.teacher_share or self.reuse > 1) and not self.student_share:
            raise UserError(
                f"answers.teacher_share is {self.teacher_share} and answers.reuse is {self.reuse}, but the student "
                "answers nothing; set answers.student_share above 0, or leave both out"
            )
        if self.teacher_share and not self.sampling.temperature:
            raise UserError("answers.teacher_share mixes what is drawn; set answers.sampling.temperature above 0")
        self.sampling.check()
        for name in ("behaviour", "only"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise UserError(f"answers.{name} {getattr(self, name)!r} is no regular expression: {error}") from None


def choose(logits_BV: Array, sampling: Sampling, keys_B: Array) -> Array:
    """Return a token for each row: the likeliest, or a draw by the row's key after temperature and cuts."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0:
        logits_BV = jnp.where(logits_BV >= _least_kept(logits_BV, sampling), logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _least_kept(logits_BV: Array, sampling: Sampling) -> Array:
    """Return, [B, 1], the smallest logit among the top-k, within top-p of those, and not below min-p."""
    falling_BV = logits_BV.max(-1, keepdims=True)
    least_B1 = falling_BV + math.log(sampling.min_p) if sampling.min_p else jnp.full_like(falling_BV, -jnp.inf)
    if sampling.top_k or sampling.top_p < 1.0:
        falling_BV = jnp.sort(logits_BV, axis=-1, descending=True)[:, : sampling.top_k or None]
        probability_BV = jax.nn.softmax(falling_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        is_kept_BV = (before_BV < sampling.top_p) | (sampling.top_p == 1.0)
        kept_BV = jnp.where(is_kept_BV, falling_BV, jnp.inf)
        least_B1 = jnp.maximum(least_B1, kept_BV.min(-1, keepdims=True))
    return least_B1
