"""Prompts that are still to be answered: which rows, and what either model sees of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdjax.data.config import DataConfig
from kdjax.data.examples import to_example, to_question
from kdjax.data.sources import Source, open_source
from kdjax.data.tokenizers import Tokenizer
from kdjax.data.views import Views, encode_question, load_views
from kdjax.errors import UserError


@dataclass(frozen=True)
class Question:
    """A row without its answer: its columns, where it comes from, and its tokens as each model sees them."""

    columns: Mapping[str, Any]
    where: str
    student: list[int]
    teacher: list[int]


def questions(config: DataConfig, tokenizer: Tokenizer, count: int, seed: int, gist: int = 0) -> list[Question]:
    """Return so many rows' questions (0: all), chosen and ordered by a hash of each prompt and the seed.

    The student's view has a `gist` of so many places.

    Raises:
        UserError: rows that cannot be read or shown, beyond `data.max_bad_rows`.
    """
    found, bad = [], 0
    for source in map(open_source, config.sources):
        for row in range(source.count):
            try:
                asked = to_question(source.record(row), config, source.where(row))
            except UserError as error:
                bad += 1
                if bad > config.max_bad_rows:
                    raise UserError(f"{error}; data.max_bad_rows lets such rows be skipped") from None
                continue
            found.append((_place(asked.document, seed), source, row))
    found.sort(key=lambda one: one[0])
    views = load_views(config, gist) or Views()
    return [_seen(source, row, config, tokenizer, views) for _, source, row in found[: count or None]]


def encode_prompt(prompt: str, config: DataConfig, tokenizer: Tokenizer, gist: int = 0) -> tuple[list[int], list[int]]:
    """Return a prompt's tokens as the student sees it, with a `gist` of so many places, and as the teacher does.

    Raises:
        UserError: a template that fails, or names other columns than the prompt's.
    """
    example = to_question({config.prompt_field: prompt}, config, "prompt")
    try:
        return encode_question(example, tokenizer, load_views(config, gist) or Views())
    except UserError as error:
        raise UserError(f"prompt {prompt!r}: {error}, or leave prompt empty") from None


def check_text(name: str, setting: str) -> None:
    """Check that a source has plain text, by its first row.

    Raises:
        UserError: it has not, or is not there.
    """
    source = open_source(name)
    kind = to_example(source.record(0), DataConfig(), source.where(0)).kind
    if kind != "text":
        raise UserError(f"{setting} names {name}, whose rows are of kind {kind}; wanted plain text, or none: ()")


def _place(prompt: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{prompt}".encode(), digest_size=8).digest()


def _seen(source: Source, row: int, config: DataConfig, tokenizer: Tokenizer, views: Views) -> Question:
    where = source.where(row)
    example = to_question(source.record(row), config, where)
    try:
        return Question(example.columns, where, *encode_question(example, tokenizer, views))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
