"""A teacher with another tokenizer: where both tokenizers have a border in one text, and which tokens correspond.

Of a text that both tokenizers spell, a border is a byte at which a token of each begins: there both models predict the
same continuation of the same text. Between two borders lies a chunk, of one token or several on either side.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from kdjax.data.examples import Example, encode_example
from kdjax.data.tokenizers import Tokenizer, byte_letters
from kdjax.data.views import Views, seen
from kdjax.errors import UserError
from kdjax.shapes import Batch, Spans, View

OUTSIDE, WITHIN, BEGINS = -1, 0, 1
"""What a row says of a token: in no chunk, in that of the token before, the first of one."""


@lru_cache(maxsize=8)
def token_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """Return of each id the bytes of text that it stands for; none for special tokens.

    Raises:
        UserError: the tokens are neither byte-level nor SentencePiece's, so that their text is not known.
    """
    backend, found = tokenizer.backend, [b""] * tokenizer.size
    decoder = json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
    added = backend.get_added_tokens_decoder()
    if "ByteLevel" in decoder:
        of_letter = {letter: byte for byte, letter in byte_letters().items()}
        spell = lambda token: bytes(of_letter[letter] for letter in token)  # noqa: E731
    elif "Metaspace" in decoder or "▁" in decoder:
        spell = _spelled_by_sentencepiece
    else:
        raise UserError(
            "a tokenizer is neither byte-level nor SentencePiece's, so that the text of its tokens is not known; with "
            "another teacher than its own a student wants one of these two kinds"
        )
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if number in tokenizer.special_ids or number == tokenizer.eos_id:
            continue
        found[number] = added[number].content.encode() if number in added else spell(token)
    return tuple(found)


def _spelled_by_sentencepiece(token: str) -> bytes:
    fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(fallback[1], 16)]) if fallback else token.replace("▁", " ").encode()


def student_of(student: Tokenizer, teacher: Tokenizer, size: int) -> np.ndarray:
    """Return of each of the teacher's `size` entries the student's longest that its text begins with.

    So an entry that both have is itself, and a student of bytes gets the next byte of whatever the teacher would say.
    Special tokens are by their names, and all others of them the end of the text.
    """
    of_text = _names(student)
    longest = max(len(name) for name in of_text if isinstance(name, bytes))
    found_U = np.full(size, student.eos_id, np.int32)
    for number, text in enumerate(token_bytes(teacher)):
        beginnings = (text[:length] for length in range(min(len(text), longest), 0, -1))
        names = beginnings if text else (teacher.backend.id_to_token(number),)
        found_U[number] = next((of_text[name] for name in names if name in of_text), student.eos_id)
    found_U[teacher.eos_id] = student.eos_id
    return found_U


def _names(tokenizer: Tokenizer) -> dict[bytes | str, int]:
    """Return the lowest id of each text, and of each special token by its name."""
    named: dict[bytes | str, int] = {}
    for number, text in enumerate(token_bytes(tokenizer)):
        name = text or (tokenizer.backend.id_to_token(number) if number in tokenizer.special_ids else None)
        if name:
            named.setdefault(name, number)
    return named


def encode_across(
    example: Example, student: Tokenizer, teacher: Tokenizer, views: Views | None, room: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return `tokens`, `weight` and `chunk` of an example in the student's tokens, and in the teacher's.

    A plain text that is too long for the `room` of one of them ends at the last border that both have room for.

    Raises:
        UserError: a conversation, or a text that the two tokenizers spell otherwise.
    """
    sides = [_parted(example, tokenizer, views) for tokenizer in (student, teacher)]
    (before, own), (ahead, other) = sides
    chunks: tuple[np.ndarray, ...] = borders(own, other, token_bytes(student), token_bytes(teacher))
    if example.kind == "text":
        ends = [np.append(np.flatnonzero(chunk_T == BEGINS), len(chunk_T)) for chunk_T in chunks]
        fits = [end <= most - len(lead) for end, most, lead in zip(ends, room, (before, ahead), strict=True)]
        last = int(np.flatnonzero(fits[0] & fits[1])[-1])
        if not ends[0][last]:
            raise UserError(
                "a row has no room for its first tokens; raise data.sequence_length and data.teacher_length"
            )
        sides = [(lead, ids[: end[last]]) for (lead, ids), end in zip(sides, ends, strict=True)]
        chunks = tuple(chunk_T[: end[last]] for chunk_T, end in zip(chunks, ends, strict=True))
    if not before or not ahead:  # nothing predicts the first token of one of them
        chunks = tuple(_without_first(chunk_T) for chunk_T in chunks)
    found: dict[str, np.ndarray] = {}
    for prefix, (prompt, ids), chunk_T in zip(("", "teacher_"), sides, chunks, strict=True):
        found[f"{prefix}tokens"] = np.array([*prompt, *ids], np.int32)
        found[f"{prefix}weight"] = np.array([0] * len(prompt) + [1] * len(ids), np.float32)
        found[f"{prefix}chunk"] = np.array([*[OUTSIDE] * len(prompt), *chunk_T], np.int32)
    return found


def _parted(example: Example, tokenizer: Tokenizer, views: Views | None) -> tuple[list[int], list[int]]:
    """Return the tokens that only condition, and those that are learned."""
    if example.kind == "messages":
        raise UserError(
            "it is a conversation, which two tokenizers write in turns of their own; wanted text or answers"
        )
    if example.kind == "answer":
        return seen("student", (views or Views()).student or "{{ prompt }}", example, tokenizer)
    ids = encode_example(example, tokenizer)["tokens"].tolist()
    size = int(bool(ids) and ids[0] in tokenizer.special_ids)
    return ids[:size], ids[size:]


def borders(
    student: Sequence[int], teacher: Sequence[int], student_bytes: Sequence[bytes], teacher_bytes: Sequence[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """Return of each token, of both, whether a chunk begins with it: as many of the student's as of the teacher's.

    Raises:
        UserError: they do not spell the same.
    """
    spelled = [
        b"".join(of_token[number] for number in ids)
        for ids, of_token in ((student, student_bytes), (teacher, teacher_bytes))
    ]
    leads = [int(text == b" " + other) for text, other in (spelled, spelled[::-1])]  # SentencePiece's space in front
    if spelled[0][leads[0] :] != spelled[1][leads[1] :]:
        raise UserError(
            f"the student's tokenizer spells {_shown(spelled[0])} but the teacher's {_shown(spelled[1])}; leave such "
            "rows out (data.max_bad_rows), or take tokenizers that keep the text as it is"
        )
    starts = [
        _starts(ids, of_token, lead)
        for ids, of_token, lead in ((student, student_bytes, leads[0]), (teacher, teacher_bytes, leads[1]))
    ]
    common = set(starts[0]) & set(starts[1])
    first, second = (_flags(each, common) for each in starts)
    return first, second


def _starts(ids: Sequence[int], of_token: Sequence[bytes], lead: int) -> list[int]:
    """Return the byte at which each token begins, without those that stand in front of the text."""
    sizes = [len(of_token[number]) for number in ids]
    return np.maximum(np.cumsum([0, *sizes])[:-1] - lead, 0).tolist()


def _flags(starts: list[int], common: set[int]) -> np.ndarray:
    """Return BEGINS at the first token of each common start, WITHIN elsewhere."""
    first = {start: place for place, start in reversed(list(enumerate(starts))) if start in common}
    flags = np.full(len(starts), WITHIN, np.int32)
    flags[list(first.values())] = BEGINS
    return flags


def _without_first(chunk_T: np.ndarray) -> np.ndarray:
    """Return the flags without the first chunk."""
    begins = np.flatnonzero(chunk_T == BEGINS)
    end = begins[1] if len(begins) > 1 else len(chunk_T)
    return np.where(np.arange(len(chunk_T)) < end, OUTSIDE, chunk_T)


def _shown(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))


def with_other_teacher(
    batch: Batch, rows: Sequence[Mapping[str, np.ndarray]], view: View, weight_BT: np.ndarray
) -> Batch:
    """Return the batch with a teacher's view in its own tokens: pairs at the borders, and chunks between them.

    The divergence then weighs where a chunk begins, the cross entropy everywhere.

    Args:
        batch: of the student's tokens.
        rows: from which it was made.
        view: the teacher's.
        weight_BT: of the token after each of the teacher's.

    Raises:
        UserError: a row has not as many chunks on both sides.
    """
    student_BT, teacher_BT = (
        np.pad(np.stack([row[name] for row in rows])[:, 1:], ((0, 0), (0, 1)), constant_values=OUTSIDE)
        for name in ("chunk", "teacher_chunk")
    )
    teacher_rows_BO = np.argsort(weight_BT == 0, axis=1, kind="stable").astype(np.int32)
    counts = batch.ce_weight_BR != 0, np.take_along_axis(weight_BT, teacher_rows_BO, axis=1) != 0
    of_student, of_teacher = (
        _numbered(np.take_along_axis(flags_BT, rows_BX, axis=1), counts_BX)
        for flags_BT, rows_BX, counts_BX in zip(
            (student_BT, teacher_BT), (batch.student_rows_BR, teacher_rows_BO), counts, strict=True
        )
    )
    (chunk_BR, begins_BR), (chunk_BO, begins_BO) = of_student, of_teacher
    if not np.array_equal(begins_BR.sum(1), begins_BO.sum(1)):
        raise UserError("a row has other chunks in the teacher's tokens than in the student's; its examples were cut")
    kth_BO = np.argsort(~begins_BO, axis=1, kind="stable")
    ahead_BR = np.minimum(np.maximum(chunk_BR - 1, 0), kth_BO.shape[1] - 1)
    pair_BR = np.take_along_axis(np.take_along_axis(teacher_rows_BO, kth_BO, axis=1), ahead_BR, axis=1)
    targets_BO = np.take_along_axis(np.pad(view.tokens_BT[:, 1:], ((0, 0), (0, 1))), teacher_rows_BO, axis=1)
    return dataclasses.replace(
        batch,
        teacher=view,
        teacher_rows_BR=np.where(begins_BR, pair_BR, 0).astype(np.int32),
        kd_weight_BR=np.where(begins_BR, batch.kd_weight_BR, np.float32(0)),
        spans=Spans(
            chunk_BR,
            np.where(counts[1], teacher_rows_BO, 0).astype(np.int32),
            np.where(counts[1], targets_BO, 0).astype(np.int32),
            chunk_BO,
        ),
    )


def _numbered(flags_BX: np.ndarray, counts_BX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each token the number of its chunk in its row, from 1, 0 where it is in none; and where one begins."""
    begins_BX = counts_BX & (flags_BX == BEGINS)
    number_BX = np.cumsum(begins_BX, axis=1)
    return np.where(counts_BX & (flags_BX != OUTSIDE), number_BX, 0).astype(np.int32), begins_BX
