"""What a teacher said of a row, as few bytes as it takes: one small pair of functions a kind, a row of `KINDS`.

All of it is numpy. A row's compared positions come first, N of its R; only these are kept, and the rest is 0 again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kdjax.errors import UserError

Arrays = dict[str, np.ndarray]
LOWEST = np.float32(-60_000)
"""Of a log-probability: float16 holds it."""
LEVELS = {8: np.uint8, 16: np.uint16}
"""Bits of a quantised value -> what holds it."""


class Kind(NamedTuple):
    """A row of `KINDS`.

    Attributes:
        pack: of (arrays of N positions, `Settings`) -> arrays as they are kept.
        unpack: of (arrays as they are kept, `Settings`) -> arrays of N positions.
    """

    pack: Callable[[Arrays, Settings], Arrays]
    unpack: Callable[[Arrays, Settings], Arrays]


class Settings(NamedTuple):
    """What both directions have to know.

    Attributes:
        vocab_size: entries of the vocabulary.
        bits: of a log-probability, 8 or 16; of a hidden state's number 16 (bfloat16) or 8 (int8, a scale a token).
        picks: entries of a top-k, or draws.
    """

    vocab_size: int
    bits: int
    picks: int = 0


def id_bits(vocab_size: int) -> int:
    """Return the bits that an entry's number takes."""
    return max(1, (vocab_size - 1).bit_length())


def pack_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return entries' numbers, bit behind bit, as bytes."""
    bits = id_bits(vocab_size)
    places = np.arange(bits, dtype=np.uint32)
    return np.packbits((ids.reshape(-1, 1).astype(np.uint32) >> places & 1).astype(np.uint8))


def unpack_ids(packed: np.ndarray, count: int, vocab_size: int) -> np.ndarray:
    """Return so many entries' numbers, int32."""
    bits = id_bits(vocab_size)
    found = np.unpackbits(packed, count=count * bits).reshape(count, bits).astype(np.int64)
    return (found << np.arange(bits)).sum(1).astype(np.int32)


def quantise(values_NP: np.ndarray, bits: int) -> Arrays:
    """Return values as whole steps between each token's lowest and highest, which are kept in float16.

    No value is further off than half a step, (high − low) / (2^bits − 1) / 2, and float16's rounding of both ends.
    """
    values_NP = np.maximum(values_NP, LOWEST)
    low_N, high_N = (end.astype(np.float16) for end in (values_NP.min(1), values_NP.max(1)))
    step_N1 = _step(low_N, high_N, bits)
    level_NP = np.round((values_NP - low_N.astype(np.float32)[:, None]) / np.where(step_N1 > 0, step_N1, 1))
    return {"level": np.clip(level_NP, 0, 2**bits - 1).astype(LEVELS[bits]), "low": low_N, "high": high_N}


def dequantised(kept: Arrays, bits: int) -> np.ndarray:
    """Return the values that `quantise` kept, float32."""
    low_N1 = kept["low"].astype(np.float32)[:, None]
    return low_N1 + kept["level"].astype(np.float32) * _step(kept["low"], kept["high"], bits)


def _step(low_N: np.ndarray, high_N: np.ndarray, bits: int) -> np.ndarray:
    return ((high_N.astype(np.float32) - low_N.astype(np.float32)) / (2**bits - 1))[:, None]


def _pack_top_k(said: Arrays, settings: Settings) -> Arrays:
    kept = quantise(said["log_probs"], settings.bits) | {"ids": pack_ids(said["ids"], settings.vocab_size)}
    kept |= {"log_tail": said["log_tail"].astype(np.float16)}
    return kept | ({"log_z": said["log_z"].astype(np.float32)} if "log_z" in said else {})  # a server tells none


def _unpack_top_k(kept: Arrays, settings: Settings) -> Arrays:
    log_probs = dequantised(kept, settings.bits)
    ids = unpack_ids(kept["ids"], log_probs.size, settings.vocab_size).reshape(log_probs.shape)
    return {"ids": ids, "log_probs": log_probs, "log_tail": kept["log_tail"].astype(np.float32)}


def _pack_sampled(said: Arrays, settings: Settings) -> Arrays:
    """Return each token's different entries, how often each was drawn, and its log-probability."""
    ids_NP, log_probs_NP = said["ids"], said["log_probs"]
    order_NP = np.argsort(ids_NP, axis=1, kind="stable")
    ids_NP, log_probs_NP = (np.take_along_axis(x, order_NP, 1) for x in (ids_NP, log_probs_NP))
    is_first_NP = np.diff(ids_NP, axis=1, prepend=-1) != 0
    starts = np.flatnonzero(is_first_NP)
    values = quantise(log_probs_NP, settings.bits)
    return {
        "unique": is_first_NP.sum(1).astype(np.uint8),
        "times": (np.diff(starts, append=is_first_NP.size)).astype(np.uint8),
        "ids": pack_ids(ids_NP[is_first_NP], settings.vocab_size),
        **(values | {"level": values["level"][is_first_NP]}),
    }


def _unpack_sampled(kept: Arrays, settings: Settings) -> Arrays:
    """Return the draws again, those of one entry put together: places that are left over weigh nothing."""
    unique_N = kept["unique"].astype(np.int64)
    row = np.repeat(np.arange(len(unique_N)), unique_N)
    column = np.arange(len(row)) - np.repeat(np.cumsum(unique_N) - unique_N, unique_N)
    shape = len(unique_N), settings.picks
    ids, level, weights = np.zeros(shape, np.int32), np.zeros(shape, kept["level"].dtype), np.zeros(shape, np.float32)
    ids[row, column] = unpack_ids(kept["ids"], len(row), settings.vocab_size)
    level[row, column], weights[row, column] = kept["level"], kept["times"] / np.float32(settings.picks)
    return {"ids": ids, "log_probs": dequantised(kept | {"level": level}, settings.bits), "weights": weights}


def _pack_hidden(said: Arrays, settings: Settings) -> Arrays:
    hidden_ND = said["hidden"].astype(np.float32)
    if settings.bits == 16:
        return {"hidden": hidden_ND.astype(ml_dtypes.bfloat16).view(np.uint16)}
    scale_N = np.abs(hidden_ND).max(1) / 127
    level_ND = np.round(hidden_ND / np.where(scale_N > 0, scale_N, 1)[:, None])
    return {"hidden": level_ND.astype(np.int8), "scale": scale_N.astype(np.float32)}


def _unpack_hidden(kept: Arrays, settings: Settings) -> Arrays:
    if settings.bits == 16:
        return {"hidden": kept["hidden"].view(ml_dtypes.bfloat16)}
    return {"hidden": kept["hidden"].astype(np.float32) * kept["scale"][:, None]}


KINDS: dict[str, Kind] = {
    "topk": Kind(_pack_top_k, _unpack_top_k),
    "sampled": Kind(_pack_sampled, _unpack_sampled),
    "hidden": Kind(_pack_hidden, _unpack_hidden),
}
"""Name -> how it is kept. What a teacher says of each: `kdjax.teacher.SAYINGS`."""


def error(kind: str, said: Mapping[str, np.ndarray], kept: Arrays, settings: Settings) -> float:
    """Return how far what is kept is from what was said, at most: of log-probabilities, or of hidden states."""
    found = KINDS[kind].unpack(kept, settings)
    count = len(next(iter(found.values())))
    wanted = {name: np.asarray(x)[:count] for name, x in said.items()}
    if kind == "hidden":
        gaps = np.asarray(found["hidden"], np.float32) - np.asarray(wanted["hidden"], np.float32)
    elif kind == "sampled":
        order_NP = np.argsort(wanted["ids"], axis=1, kind="stable")
        ids_NP, log_probs_NP = (np.take_along_axis(wanted[name], order_NP, 1) for name in ("ids", "log_probs"))
        gaps = found["log_probs"][found["weights"] > 0] - log_probs_NP[np.diff(ids_NP, axis=1, prepend=-1) != 0]
    else:
        gaps = found["log_probs"] - np.maximum(wanted["log_probs"], LOWEST)
    return float(np.abs(gaps).max(initial=0))


def packed(kind: str, said: Mapping[str, np.ndarray], count: int, settings: Settings) -> Arrays:
    """Return what is kept of a row: `said` by name, of whose positions the first `count` are compared."""
    return KINDS[kind].pack({name: np.asarray(values)[:count] for name, values in said.items()}, settings)


def unpacked(kind: str, kept: Arrays, positions: int, settings: Settings) -> Arrays:
    """Return what `packed` was given, zeros at the positions that are not compared.

    Raises:
        UserError: more positions than there is room for.
    """
    found = KINDS[kind].unpack(kept, settings)
    count = len(next(iter(found.values())))
    if count > positions:
        raise UserError(f"a row of the cache says something of {count} positions, but has {positions}")
    return {name: np.pad(x, [(0, positions - count)] + [(0, 0)] * (x.ndim - 1)) for name, x in found.items()}
