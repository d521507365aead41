"""What a prompt is worth at an example: by the answer written, the label weighed, or the answer's likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdjax.errors import UserError, did_you_mean
from kdjax.prompts.config import PromptsConfig
from kdjax.prompts.speaker import How, Speaker
from kdjax.prompts.tasks import LIKELIHOOD, TASKS, Candidate, Example, Task, show

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs that say nothing about their label."""

Pair = tuple[Candidate, Example]


@dataclass(frozen=True)
class Evaluation:
    """What a candidate is worth at an example.

    Attributes:
        score: by the measure; more is better.
        tokens: read and written for it.
        said: the answer, as text.
    """

    score: float
    tokens: int
    said: str


@dataclass(frozen=True)
class Scoring:
    """How candidates are measured.

    Attributes:
        task: what the prompts are for.
        measure: one of the task's, or `LIKELIHOOD`; empty means the task's first.
        labels: of a task that has such.
        max_new_tokens: of a written answer.
        calibrated: whether what labels get without any content is taken off.
    """

    task: Task
    measure: str = ""
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 32
    calibrated: bool = True

    def __post_init__(self) -> None:
        known = (*self.task.measures, LIKELIHOOD)
        if not self.measure:
            object.__setattr__(self, "measure", known[0])
        if self.measure not in known:
            raise UserError(f"unknown measure {self.measure!r} of this task{did_you_mean(self.measure, known)}")
        if self.by_labels and len(set(self.labels)) < 2:
            raise UserError(f"labels are {list(self.labels)}; wanted at least two different ones")

    @property
    def by_labels(self) -> bool:
        """Whether labels are weighed against each other."""
        return self.task.has_labels and self.measure != LIKELIHOOD

    @property
    def needs_priors(self) -> bool:
        """Whether a candidate's `prior` is wanted before it is evaluated."""
        return self.by_labels and self.calibrated

    def check(self, examples: Sequence[Example]) -> None:
        """Check that the answers can be measured.

        Raises:
            UserError: an answer that is none of the labels.
        """
        for example in examples if self.task.has_labels and self.labels else ():
            if example.answer not in self.labels:
                raise UserError(
                    f"the answer {example.answer!r} is none of the labels{did_you_mean(example.answer, self.labels)}"
                )


def scoring_as(config: PromptsConfig) -> Scoring:
    """Return how a config's candidates are measured.

    Raises:
        UserError: a measure that the task has not, or labels that are none.
    """
    task, tokens = TASKS[config.task], config.max_new_tokens
    return Scoring(task, config.measure, config.labels, tokens, calibrated=config.calibrated)


@dataclass(frozen=True)
class Prior:
    """What labels get without any content: log-probabilities that sum to 1, and the tokens that it took."""

    log_probs: tuple[float, ...]
    tokens: int = field(compare=False)


def priors(speaker: Speaker, scoring: Scoring, candidates: Sequence[Candidate]) -> list[Prior]:
    """Return log p̄ of each candidate: the mean over content-free inputs of the labels' probabilities.

    Paper: Zhao et al. 2021, Calibrate Before Use, arXiv:2102.09690, section 5.
    """
    pairs = [(candidate, Example(text, "")) for candidate in candidates for text in CONTENT_FREE]
    weighed = weigh_labels(speaker, scoring, pairs)
    found = []
    for first in range(0, len(pairs), len(CONTENT_FREE)):
        some = weighed[first : first + len(CONTENT_FREE)]
        probs_Y = np.mean([np.exp(log_softmax(log_probs_Y)) for log_probs_Y, _ in some], axis=0)
        found.append(Prior(tuple(np.log(probs_Y + 1e-30).tolist()), sum(tokens for _, tokens in some)))
    return found


def evaluate(
    speaker: Speaker, scoring: Scoring, pairs: Sequence[Pair], prior_of: Mapping[str, Prior]
) -> list[Evaluation]:
    """Return what each candidate is worth at its example.

    Args:
        speaker: the model that answers.
        scoring: how it is measured.
        pairs: what is measured.
        prior_of: by the candidate's id, where `scoring.needs_priors`.
    """
    if scoring.measure == LIKELIHOOD:
        return _by_likelihood(speaker, scoring, pairs)
    if scoring.by_labels:
        return _by_labels(speaker, scoring, pairs, prior_of)
    return _by_answer(speaker, scoring, pairs)


def _by_answer(speaker: Speaker, scoring: Scoring, pairs: Sequence[Pair]) -> list[Evaluation]:
    measure = scoring.task.measures[scoring.measure]
    if measure is None:
        raise UserError(f"{scoring.measure} is measured by labels; give some")
    prompts = [show(scoring.task, candidate, example.input) for candidate, example in pairs]
    said = speaker.say(prompts, How(scoring.max_new_tokens, scoring.task.stop))
    return [
        Evaluation(measure(answer.text.strip(), example.answer), answer.tokens, answer.text.strip())
        for answer, (_, example) in zip(said, pairs, strict=True)
    ]


def _by_likelihood(speaker: Speaker, scoring: Scoring, pairs: Sequence[Pair]) -> list[Evaluation]:
    """Return the mean log-probability of the wanted answer's tokens.

    Paper: Zhou et al. 2022, APE, arXiv:2211.01910, section 3.2.
    """
    asked = [(show(scoring.task, candidate, example.input), example.answer) for candidate, example in pairs]
    return [
        Evaluation(found.log_prob / found.answer_tokens, found.prompt_tokens + found.answer_tokens, "")
        for found in speaker.weigh(asked)
    ]


def _by_labels(
    speaker: Speaker, scoring: Scoring, pairs: Sequence[Pair], prior_of: Mapping[str, Prior]
) -> list[Evaluation]:
    """Return 1 or 0 by the likeliest label, or the right label's probability, once what it gets anyway is taken off."""
    found = []
    for (candidate, example), (log_probs_Y, tokens) in zip(pairs, weigh_labels(speaker, scoring, pairs), strict=True):
        if scoring.needs_priors:
            log_probs_Y = log_probs_Y - np.array(prior_of[candidate.id].log_probs)
        right, best = scoring.labels.index(example.answer), int(np.argmax(log_probs_Y))
        score = LABEL_SCORES[scoring.measure](log_softmax(log_probs_Y), right)
        found.append(Evaluation(score, tokens, scoring.labels[best]))
    return found


LABEL_SCORES: dict[str, Callable[[np.ndarray, int], float]] = {
    "accuracy": lambda log_probs_Y, right: float(int(np.argmax(log_probs_Y)) == right),
    "probability": lambda log_probs_Y, right: math.exp(log_probs_Y[right]),
}
"""Measures by the labels' log-probabilities and the number of the right one."""


def weigh_labels(speaker: Speaker, scoring: Scoring, pairs: Sequence[Pair]) -> list[tuple[np.ndarray, int]]:
    """Return the log-probability of each label, summed over its tokens, and the tokens read: a prompt counts once."""
    prompts = [show(scoring.task, candidate, example.input) for candidate, example in pairs]
    weighed = speaker.weigh([(prompt, label) for prompt in prompts for label in scoring.labels])
    of_pair = (weighed[first : first + len(scoring.labels)] for first in range(0, len(weighed), len(scoring.labels)))
    return [
        (np.array([w.log_prob for w in some]), some[0].prompt_tokens + sum(w.answer_tokens for w in some))
        for some in of_pair
    ]


def log_softmax(x_Y: np.ndarray) -> np.ndarray:
    """Return log-probabilities that sum to 1."""
    shifted_Y = x_Y - x_Y.max()
    return shifted_Y - np.log(np.exp(shifted_Y).sum())
