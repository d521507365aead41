"""What a model that is asked can do: answer prompts, and weigh answers by their log-probability.

One is local (`kdjax.prompts.local`) or behind a server (`kdjax.prompts.server`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kdjax.generate import GREEDY
from kdjax.sampling import Sampling


@dataclass(frozen=True)
class How:
    """How an answer is written."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0


class Said(NamedTuple):
    """An answer, and the tokens that were read and written for it."""

    text: str
    tokens: int


class Weighed(NamedTuple):
    """The log-probability (nats) of an answer after its prompt, and the tokens of both."""

    log_prob: float
    prompt_tokens: int
    answer_tokens: int


class Speaker(Protocol):
    """A model that is asked."""

    @property
    def name(self) -> str:
        """What a user calls it."""
        ...

    def say(self, prompts: Sequence[str], how: How) -> list[Said]:
        """Return what it says to each prompt."""
        ...

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[Weighed]:
        """Return how likely each answer is after its prompt."""
        ...
