"""From examples to rows of one length, and from rows to a `Batch`: here, once, targets are shifted by one token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from kdjax.data.config import Packing
from kdjax.shapes import Batch, View

Row = Mapping[str, np.ndarray]
"""`tokens`, `tokens_segment_ids` (from 1; 0 is padding), `tokens_positions` and `weight`, each of the row's length."""

_BINS = 16
"""Rows that first-fit fills at a time: more waste less, and read further ahead."""


def pack(
    examples: grain.MapDataset, packing: Packing, length: int, shuffle_seed: int | None = None
) -> grain.IterDataset:
    """Return the examples' tokens and weights as rows of `length`; first-fit's rows are shuffled if a seed is given."""
    stream = examples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    lengths = {"tokens": length, "weight": length}
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


def empty_row(length: int) -> Row:
    """Return a row of padding, which weighs nothing."""
    zeros = np.zeros(length, np.int32)
    return {
        "tokens": zeros,
        "tokens_segment_ids": zeros,
        "tokens_positions": zeros,
        "weight": np.zeros(length, np.float32),
    }


def to_batch(rows: Sequence[Row]) -> Batch:
    """Return the rows as one batch: each position that has a next token in its own segment, with that as target.

    The weight is that of the target. Positions come first that have one; the rest of `student_rows_BR`, which is as
    long as the row, is 0 with target 0 and weight 0.
    """
    tokens_BT, segment_BT, position_BT = (
        np.stack([row[name] for row in rows]).astype(np.int32)
        for name in ("tokens", "tokens_segment_ids", "tokens_positions")
    )
    token_weight_BT = np.stack([row["weight"] for row in rows]).astype(np.float32)
    follows_BT = (segment_BT > 0) & (segment_BT == _next(segment_BT))
    weight_BT = np.where(follows_BT, _next(token_weight_BT), np.float32(0))
    rows_BR = np.argsort(weight_BT == 0, axis=1, kind="stable").astype(np.int32)
    weight_BR = np.take_along_axis(weight_BT, rows_BR, axis=1)
    targets_BR = np.take_along_axis(_next(tokens_BT), rows_BR, axis=1)
    counts_BR = weight_BR != 0
    return Batch(
        student=View(tokens_BT, segment_BT, position_BT),
        student_rows_BR=np.where(counts_BR, rows_BR, 0).astype(np.int32),
        targets_BR=np.where(counts_BR, targets_BR, 0).astype(np.int32),
        ce_weight_BR=weight_BR,
        kd_weight_BR=weight_BR,
    )


def _next(values_BT: np.ndarray) -> np.ndarray:
    """Return the values one position later; 0 at the end."""
    return np.pad(values_BT[:, 1:], ((0, 0), (0, 1)))
