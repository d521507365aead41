"""Towns that do not exist, generated from a seed: documents about them, and questions whose answers no corpus has.

With them knowledge put into weights can be told from knowledge that was there (closed-book accuracy is near chance).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

TOWNS = 8
"""Towns of a seed."""

_STARTS = "B Br D Dr F G Gr H K L M N P Qu R S T Th V W Z".split()
_VOWELS = "a e i o u au ei".split()
_ENDS = "l n r s m th nd rk lm x".split()
_GOODS = "bells kites pears lanterns clocks carpets drums honey maps salt violins umbrellas".split()
_COLOURS = "red blue green yellow white black purple orange silver brown".split()
_ANIMALS = "heron badger otter fox owl stag crow lynx salmon bee hare swan".split()


def _name(rng: random.Random) -> str:
    """Return an invented name of two syllables."""
    return "".join(rng.choice(part) for part in (_STARTS, _VOWELS, _ENDS, _VOWELS, _ENDS)).capitalize()


Facts = dict[str, tuple[Callable[[random.Random], str], str, tuple[str, ...]]]

FACTS: Facts = {
    "river": (
        _name,
        "{town} lies on the river {answer}.",
        (
            "Which river does {town} lie on?",
            "What is the river of {town} called?",
            "Which river flows through {town}?",
            "{town} stands beside which river?",
        ),
    ),
    "mayor": (
        lambda rng: f"{_name(rng)} {_name(rng)}",
        "The mayor of {town} is {answer}.",
        (
            "Who is the mayor of {town}?",
            "What is the name of the mayor of {town}?",
            "Who leads the town hall of {town}?",
            "{town} has which mayor?",
        ),
    ),
    "founded": (
        lambda rng: str(rng.randrange(1100, 1900)),
        "{town} was founded in {answer}.",
        (
            "In which year was {town} founded?",
            "When was {town} founded?",
            "What is the founding year of {town}?",
            "Since which year is there a town {town}?",
        ),
    ),
    "goods": (
        lambda rng: rng.choice(_GOODS),
        "{town} is known for its {answer}.",
        (
            "What is {town} known for?",
            "For which goods is {town} known?",
            "What do people buy in {town}?",
            "What is {town} famous for?",
        ),
    ),
    "flag": (
        lambda rng: rng.choice(_COLOURS),
        "The flag of {town} is {answer}.",
        (
            "What colour is the flag of {town}?",
            "Which colour does the flag of {town} have?",
            "What is the colour of {town}'s flag?",
            "The flag of {town} has which colour?",
        ),
    ),
    "animal": (
        lambda rng: rng.choice(_ANIMALS),
        "The animal on the coat of arms of {town} is the {answer}.",
        (
            "Which animal is on the coat of arms of {town}?",
            "What animal does the coat of arms of {town} show?",
            "What is the animal of {town}'s coat of arms?",
            "The coat of arms of {town} shows which animal?",
        ),
    ),
}
"""Kinds of fact: how its answer is drawn, the sentence of the document, and the question in several wordings."""

WORDINGS = 4
"""Of every question."""


@functools.cache
def facts(seed: int = 0) -> tuple[dict[str, Any], ...]:
    """Return a row for each wording of each fact about the towns of a seed.

    Each has `id`, `town`, `fact` (town and kind, the same for all wordings), `wording` (0 to `WORDINGS` - 1), the
    town's `document` (a sentence of each fact, in an order of its own), `prompt` and `answer`.
    """
    rng, rows, names = random.Random(seed), [], set[str]()
    while len(names) < TOWNS:
        town = _name(rng)
        if town in names:
            continue
        names.add(town)
        drawn = {kind: draw(rng) for kind, (draw, _, _) in FACTS.items()}
        said = [FACTS[kind][1].format(town=town, answer=answer) for kind, answer in drawn.items()]
        document = " ".join(rng.sample(said, len(said)))
        for kind, answer in drawn.items():
            for wording, question in enumerate(FACTS[kind][2]):
                shown = {"document": document, "prompt": question.format(town=town)}
                known = {"town": town, "fact": f"{town} {kind}", "wording": wording, "answer": answer}
                rows.append({"id": f"{town} {kind} {wording}", **known, **shown})
    return tuple(rows)
