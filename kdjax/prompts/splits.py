"""Rows as examples, dealt by a hash of their input into three parts that share none: propose, select, report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from kdjax.data.chat import render
from kdjax.data.sources import open_source
from kdjax.errors import UserError
from kdjax.prompts.config import PromptsConfig
from kdjax.prompts.tasks import Example

MOST_ROWS = 50_000
"""So many rows of a source are looked at, spread over all of it."""

LEAST = 2
"""Examples that each part must have."""


@dataclass(frozen=True)
class Splits:
    """Examples to propose with, to select by, and to report on once."""

    propose: tuple[Example, ...]
    select: tuple[Example, ...]
    test: tuple[Example, ...]


def read_examples(sources: Sequence[str], given: str, wanted: str) -> list[Example]:
    """Return the examples of all rows that have an input and an answer, in order.

    Args:
        sources: as `kdjax.data.sources` names them.
        given: the template that writes the input from a row's columns.
        wanted: the one that writes the answer.

    Raises:
        UserError: a row that a template fails at, or no example at all.
    """
    found = []
    for name in sources:
        source = open_source(name)
        for row in np.unique(np.linspace(0, source.count - 1, min(source.count, MOST_ROWS)).astype(int)).tolist():
            record, where = source.record(row), source.where(row)
            example = Example(_text("input", given, record, where), _text("answer", wanted, record, where))
            found += [example] if example.input and example.answer else []
    if not found:
        raise UserError(f"no row of {', '.join(sources) or 'no source'} has both an input and an answer; mend them")
    return found


def _text(field: str, template: str, record: Mapping[str, object], where: str) -> str:
    try:
        return render(template, record, strict=True).strip()
    except UserError as error:
        columns = ", ".join(map(str, record))
        raise UserError(f"{where}: the template of the {field} {error} (columns: {columns}); mend {field}") from None


def split_as(config: PromptsConfig, examples: Sequence[Example]) -> Splits:
    """Return the examples in the three parts that a config wants.

    Raises:
        UserError: too few examples for three parts.
    """
    sizes = (config.propose_rows, config.select_rows, config.test_rows)
    return split(examples, sizes, config.seed, balanced=config.balanced)


def split(examples: Sequence[Example], sizes: Sequence[int], seed: int, balanced: bool = False) -> Splits:
    """Return the examples in three parts of at most these sizes, by a hash of the input alone.

    Inputs that are the same but for case and space are one example, the first of them.

    Args:
        examples: to be dealt.
        sizes: of the parts, at most.
        seed: of the hash.
        balanced: whether each part has as many examples of each answer, in turn; the others are left out.

    Raises:
        UserError: too few examples for three parts.
    """
    first = {}
    for example in examples:
        first.setdefault(_place(example.input, seed), example)
    ends = [end / sum(sizes) for end in accumulate(sizes)]
    parts: list[list[Example]] = [[] for _ in sizes]
    for place in sorted(first):
        part = parts[next(number for number, end in enumerate(ends) if place < end)]
        part.append(first[place])
    if balanced:
        answers = sorted({example.answer for example in first.values()})
        parts, sizes = [_in_turn(part, answers) for part in parts], [size - size % len(answers) for size in sizes]
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    if min(map(len, parts)) < LEAST:
        raise UserError(
            f"{len(first)} different examples make {'balanced ' if balanced else ''}parts of "
            f"{', '.join(str(len(part)) for part in parts)} to propose with, to select by and to report on; wanted "
            f"{LEAST} each: give more rows, or ask for larger parts"
        )
    return Splits(*map(tuple, parts))


def _in_turn(examples: Sequence[Example], answers: Sequence[str]) -> list[Example]:
    """Return an example of each answer in turn, as long as there is one of each."""
    groups = ([example for example in examples if example.answer == answer] for answer in answers)
    return list(chain.from_iterable(zip(*groups, strict=False)))


def plain(text: str) -> str:
    """Return a text without regard to case and space: inputs of equal ones are one example."""
    return " ".join(text.casefold().split())


def _place(text: str, seed: int) -> float:
    """Return where in [0, 1) an input falls."""
    digest = hashlib.blake2b(plain(text).encode(), digest_size=8, salt=str(seed).encode()[-16:]).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
