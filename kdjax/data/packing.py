"""From examples to rows of one length, and from rows to a `Batch`.

Here, once, targets are shifted by one token, where examples do not bring them in their places.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from kdjax.data.across import with_other_teacher
from kdjax.data.config import Packing
from kdjax.errors import UserError
from kdjax.shapes import Batch, View

Row = Mapping[str, np.ndarray]
"""`tokens`, `tokens_segment_ids` (from 1; 0 is padding), `tokens_positions` and `weight`, each of the row's length;
maybe `targets`, and the `source` of each token; the first three of an encoder's `inputs`, all four of a teacher's own
view, `teacher_tokens`, and where that is of another tokenizer how both fall into chunks (`kdjax.data.across`). Out of a
cache also what the teacher said at each compared position, in their order, under names that begin with `SAID`."""

SAID = "said."

_BINS = 16
"""Rows that first-fit fills at a time: more waste less, and read further ahead."""


def pack(
    examples: grain.MapDataset, packing: Packing, lengths: Mapping[str, int], shuffle_seed: int | None = None
) -> grain.IterDataset:
    """Return the parts of examples as rows of these lengths; first-fit's rows are shuffled if a seed is given."""
    stream = examples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    lengths = dict(lengths)
    if packing == "concat":
        return grain.experimental.ConcatThenSplitIterDataset(stream, length_struct=lengths)
    return grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct=lengths,
        num_packing_bins=_BINS,
        shuffle_bins=shuffle_seed is not None,
        seed=shuffle_seed or 0,
    )


def get_state(iterator: grain.DatasetIterator) -> dict[str, Any]:
    """Return where the iterator stands, as plain JSON."""
    return json.loads(json.dumps(iterator.get_state()))


def set_state(iterator: grain.DatasetIterator, state: dict[str, Any]) -> None:
    """Put the iterator where `get_state` found it."""
    if "remainder_slices" in state:  # grain tells a whole document by the tuple (-1, -1), which JSON makes a list
        slices = {name: tuple(bounds) for name, bounds in state["remainder_slices"].items()}
        state = {**state, "remainder_slices": slices}
    iterator.set_state(state)


def empty_row(like: Row) -> Row:
    """Return a row of padding, which weighs nothing."""
    return {name: np.zeros_like(values) for name, values in like.items()}


def to_batch(rows: Sequence[Row]) -> Batch:
    """Return the rows as one batch: each position that has a target, which has its weight.

    Where rows bring no `targets`, that is the next token, if it is of the same segment. Positions come first that have
    one; the rest of `student_rows_BR`, which is as long as the row, is 0 with target 0 and weight 0.
    """
    view, weight_BT = _view(rows, "tokens"), np.stack([row["weight"] for row in rows]).astype(np.float32)
    if "targets" in rows[0]:
        targets_BT = np.stack([row["targets"] for row in rows]).astype(np.int32)
        weight_BT = np.where(view.segment_BT > 0, weight_BT, np.float32(0))
    else:
        targets_BT, weight_BT = _next(view.tokens_BT), _of_next(view, weight_BT)
    rows_BR = _weighed_first(weight_BT)
    weight_BR = np.take_along_axis(weight_BT, rows_BR, axis=1)
    targets_BR = np.take_along_axis(targets_BT, rows_BR, axis=1)
    counts_BR = weight_BR != 0
    batch = Batch(
        student=dataclasses.replace(view, encoder=_view(rows, "inputs")) if "inputs" in rows[0] else view,
        student_rows_BR=np.where(counts_BR, rows_BR, 0).astype(np.int32),
        targets_BR=np.where(counts_BR, targets_BR, 0).astype(np.int32),
        ce_weight_BR=weight_BR,
        kd_weight_BR=weight_BR,
    )
    if "source" in rows[0]:
        source_BR = np.take_along_axis(np.stack([row["source"] for row in rows]), rows_BR, axis=1).astype(np.int32)
        batch = dataclasses.replace(batch, source_BR=source_BR)
    if said := [name for name in rows[0] if name.startswith(SAID)]:
        brought = {name.removeprefix(SAID): np.stack([row[name] for row in rows]) for name in said}
        batch = dataclasses.replace(batch, signal={"said": brought, "taps": {}})
    return _with_teacher(batch, rows, counts_BR) if "teacher_tokens" in rows[0] else batch


def _with_teacher(batch: Batch, rows: Sequence[Row], counts_BR: np.ndarray) -> Batch:
    """Return the batch with the teacher's own view, where as many tokens of each example weigh, in the same order."""
    view = _view(rows, "teacher_tokens")
    weight_BT = _of_next(view, np.stack([row["teacher_weight"] for row in rows]).astype(np.float32))
    if "chunk" in rows[0]:
        return with_other_teacher(batch, rows, view, weight_BT)
    most = counts_BR.shape[1]
    rows_BR = np.pad(_weighed_first(weight_BT)[:, :most], ((0, 0), (0, max(0, most - weight_BT.shape[1]))))
    return dataclasses.replace(batch, teacher=view, teacher_rows_BR=np.where(counts_BR, rows_BR, 0).astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Asked:
    """The tokens of an example: before its answer, as each model sees them, and of the answer."""

    student: list[int]
    teacher: list[int]
    answer: list[int]

    @property
    def unprompted(self) -> list[int]:
        """What the student sees before the answer behind a gist; all of it where there is none."""
        gist = [place for place, token in enumerate(self.student) if token < 0]
        return self.student[gist[-1] + 1 :] if gist else self.student


def examples_of(rows: Sequence[Row]) -> list[Asked]:
    """Return the examples in packed rows, each a prompt with its answer."""
    return [
        _asked(row, number) for row in rows for number in range(1, int(row["tokens_segment_ids"].max(initial=0)) + 1)
    ]


def _asked(row: Row, number: int) -> Asked:
    before, answer = _parted(row, number, "tokens", "weight")
    teacher = _parted(row, number, "teacher_tokens", "teacher_weight")[0] if "teacher_tokens" in row else before
    return Asked(before, teacher, answer)


def _parted(row: Row, number: int, name: str, weight: str) -> tuple[list[int], list[int]]:
    """Return the tokens before the answer, and the answer's, without the room that is kept for a longer one."""
    is_here_T = row[f"{name}_segment_ids"] == number
    tokens, weighs = row[name][is_here_T], row[weight][is_here_T] != 0
    return tokens[: int(np.argmax(weighs))].tolist(), tokens[weighs].tolist()


def rows_of(batch: Batch) -> Sequence[Row]:
    """Return the rows that `to_batch` made a batch of prompts and answers from."""
    views = {"": (batch.student, batch.student_rows_BR), "teacher_": (batch.teacher, batch.teacher_rows_BR)}
    found: list[dict[str, np.ndarray]] = [{} for _ in batch.targets_BR]
    for prefix, (view, rows_BR) in views.items():
        if view is None or rows_BR is None:
            continue
        for b, row in enumerate(found):
            counts_R = batch.kd_weight_BR[b] != 0
            row[f"{prefix}weight"] = np.zeros(view.tokens_BT.shape[1], np.float32)
            row[f"{prefix}weight"][rows_BR[b][counts_R] + 1] = batch.kd_weight_BR[b][counts_R]
            names = {"": view.tokens_BT, "_segment_ids": view.segment_BT, "_positions": view.position_BT}
            row |= {f"{prefix}tokens{suffix}": values_BT[b] for suffix, values_BT in names.items()}
    return found


def reanswered(rows: Sequence[Row], answers: Sequence[list[int]]) -> Batch:
    """Return the batch of packed rows whose examples have other answers, in the order of `examples_of`.

    These are no targets: only what a teacher says of them is learned, so the cross entropy weighs nothing.

    Raises:
        UserError: an answer is longer than the room after its prompt.
    """
    rows, left = [{name: values.copy() for name, values in row.items()} for row in rows], iter(answers)
    for row in rows:
        for number in range(1, int(row["tokens_segment_ids"].max(initial=0)) + 1):
            answer = next(left)
            for prefix in ("", "teacher_") if "teacher_tokens" in row else ("",):
                _put_answer(row, prefix, number, answer)
    return answered(rows)


def answered(rows: Sequence[Row]) -> Batch:
    """Return the batch of packed rows whose answers are no targets: the cross entropy weighs nothing."""
    batch = to_batch(rows)
    return dataclasses.replace(batch, ce_weight_BR=np.zeros_like(batch.ce_weight_BR))


def _put_answer(row: dict[str, np.ndarray], prefix: str, number: int, answer: list[int]) -> None:
    weight_T = row[f"{prefix}weight"]
    at = np.flatnonzero(row[f"{prefix}tokens_segment_ids"] == number)
    at = at[int(np.argmax(weight_T[at] != 0)) :]
    if len(answer) > len(at):
        raise UserError(f"an answer of {len(answer)} tokens was given, but its row has room for {len(at)}")
    weight_T[at] = 0
    row[f"{prefix}tokens"][at[: len(answer)]] = answer
    weight_T[at[: len(answer)]] = 1


def in_rows(examples: Sequence[Asked], unit: int = 32) -> Batch:
    """Return a batch with each example alone in a row, as wide as the longest, rounded up to a multiple of `unit`."""
    views = {"": "student", "teacher_": "teacher"}
    widths = {
        prefix: -(-max(len(getattr(one, name)) + len(one.answer) for one in examples) // unit) * unit
        for prefix, name in views.items()
    }

    def row(one: Asked) -> Row:
        found = {}
        for prefix, name in views.items():
            before, width = getattr(one, name), widths[prefix]
            found |= _padded(f"{prefix}tokens", [*before, *one.answer], width)
            found[f"{prefix}weight"] = np.zeros(width, np.float32)
            found[f"{prefix}weight"][len(before) : len(before) + len(one.answer)] = 1
        return found

    return to_batch([row(one) for one in examples])


def _padded(name: str, tokens: list[int], width: int) -> dict[str, np.ndarray]:
    """Return the tokens at the front of a row, with segment and positions."""
    at_T = np.arange(width, dtype=np.int32)
    is_real_T = at_T < len(tokens)
    row_T = np.zeros(width, np.int32)
    row_T[: len(tokens)] = tokens
    return {name: row_T, f"{name}_segment_ids": is_real_T.astype(np.int32), f"{name}_positions": at_T * is_real_T}


def _of_next(view: View, weight_BT: np.ndarray) -> np.ndarray:
    """Return at each position the weight of the token that follows, if it is of the same segment."""
    follows_BT = (view.segment_BT > 0) & (view.segment_BT == _next(view.segment_BT))
    return np.where(follows_BT, _next(weight_BT), np.float32(0))


def _weighed_first(weight_BT: np.ndarray) -> np.ndarray:
    """Return all positions, those first that weigh something."""
    return np.argsort(weight_BT == 0, axis=1, kind="stable").astype(np.int32)


def _view(rows: Sequence[Row], name: str) -> View:
    tokens_BT, segment_BT, position_BT = (
        np.stack([row[name + suffix] for row in rows]).astype(np.int32) for suffix in ("", "_segment_ids", "_positions")
    )
    return View(tokens_BT, segment_BT, position_BT)


def _next(values_BT: np.ndarray) -> np.ndarray:
    """Return the values one position later; 0 at the end."""
    return np.pad(values_BT[:, 1:], ((0, 0), (0, 1)))
