"""Prompts that a model makes up, for distillation: from a pool of prompts, or out of its own chat template.

To add a way: a function ``way(speaker, pool, count, how, draw) -> texts``, and a row in `WAYS` at the foot.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from rapidfuzz.distance import LCSseq

from kdjax.errors import UserError
from kdjax.prompts.local import Local
from kdjax.prompts.measures import words
from kdjax.prompts.speaker import How, Speaker

NOVELTY = 0.7
"""A prompt whose ROUGE-L F1 with a kept one is above this is dropped (Self-Instruct, arXiv:2212.10560, section 2.2)."""

SHORTEST, LONGEST = 3, 150
"""Words that a prompt has at least and at most."""

SHOWN, SHOWN_MADE = 8, 2
"""Prompts of the pool that a model is shown, and how many of them are its own."""

UNFINISHED = "\0"
"""Ends a text that the model did not end."""


@dataclass
class Pool:
    """Prompts that are kept, and what became of the others.

    Attributes:
        given: those that a person wrote.
        made: those that were made up and kept.
        dropped: how many were not kept, by the reason.
    """

    given: Sequence[str]
    made: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    _words: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._words = [words(text) for text in self.given]

    def offer(self, text: str) -> None:
        """Keep a prompt, or count why not."""
        own = words(text)
        reason = next((name for name, is_so in REASONS.items() if is_so(text, own, self._words)), None)
        if reason is None:
            self.made.append(text)
            self._words.append(own)
        else:
            self.dropped[reason] += 1


def nearest(own: Sequence[str], others: Sequence[Sequence[str]]) -> float:
    """Return the highest ROUGE-L F1 of some words with others."""
    return max((2 * LCSseq.similarity(own, other) / (len(own) + len(other) or 1) for other in others), default=0.0)


REASONS: dict[str, Callable[[str, Sequence[str], Sequence[Sequence[str]]], bool]] = {
    "unfinished": lambda text, own, others: text.endswith(UNFINISHED),
    "too short": lambda text, own, others: len(own) < SHORTEST,
    "too long": lambda text, own, others: len(own) > LONGEST,
    "like another one": lambda text, own, others: nearest(own, others) > NOVELTY,
}
"""Why a prompt is not kept, in the order in which it is looked at."""

Way = Callable[[Speaker, Pool, int, How, Random], list[str]]


def self_instruct(speaker: Speaker, pool: Pool, count: int, how: How, draw: Random) -> list[str]:
    """Return prompts with which a model goes on with a list of some from the pool; the last of each list is cut off.

    Paper: Wang et al. 2022, Self-Instruct, arXiv:2212.10560, section 2.2.

    Raises:
        UserError: no prompts to begin with.
    """
    if not pool.given:
        raise UserError("self_instruct goes on with prompts that a person wrote; give some as instructions")
    lists = []
    for _ in range(count):
        made = draw.sample(pool.made, min(SHOWN_MADE, len(pool.made)))
        shown = [*draw.sample(list(pool.given), min(SHOWN - len(made), len(pool.given))), *made]
        draw.shuffle(shown)
        tasks = "".join(f"Task {number}: {' '.join(text.split())}\n" for number, text in enumerate(shown, 1))
        lists.append(f"Come up with a series of tasks:\n\n{tasks}Task {len(shown) + 1}:")
    said = speaker.say(lists, how)
    return [text for answer in said for text in _tasks(answer.text)]


def _tasks(text: str) -> list[str]:
    """Return the tasks of a list; what follows the last number may have been cut, so it is marked as such."""
    parts = [" ".join(part.split()) for part in re.split(r"(?:^|\n)\s*(?:Task )?\d+[:.)]", text)]
    parts = [part for part in parts if part]
    return parts if len(parts) < 2 else [*parts[:-1], parts[-1] + UNFINISHED]


def magpie(speaker: Speaker, pool: Pool, count: int, how: How, draw: Random) -> list[str]:
    """Return what a chat model writes where its template lets the user speak, up to the end of the turn.

    Paper: Xu et al. 2024, Magpie, arXiv:2406.08464, section 2.1.

    Raises:
        UserError: the model is behind a server, which shows no template.
    """
    if not isinstance(speaker, Local):
        raise UserError(f"magpie writes into the chat template of a local model; {speaker.name} is none")
    return [turn.text.strip() + ("" if turn.is_over else UNFINISHED) for turn in speaker.turns(count, how)]


WAYS: dict[str, Way] = {"self_instruct": self_instruct, "magpie": magpie}
"""Ways to make up prompts."""
