"""How much of the logits, and of the head's gradient, exists at one time: memory against speed, by backend."""

from __future__ import annotations

from kdjax import environment
from kdjax.losses.objective import ObjectiveConfig

CHUNK_MIB = {"cpu": 1024, "other": 2048}
"""Memory that one chunk's logits may take unless objective.chunk_mib says otherwise."""

COPIES = 4
"""Arrays of a chunk's logits that exist at one time, at most: both models', the gradient, and a second teacher's."""

BLOCK_MIB = {"cpu": 1, "other": 256}
"""Memory that one array of a block's logits may take: on a CPU what its caches hold, elsewhere enough to fill it."""

PRODUCT_MIB = {"cpu": 24, "other": 256}
"""Memory that a part of the product which a chunk adds to the head's gradient may take."""


def chunk_size(objective: ObjectiveConfig, n: int, columns: int, backend: str | None = None) -> int:
    """Return how many of n tokens make a chunk: as set, or a multiple of 64 whose logits fit the memory budget.

    Where it can, auto makes at least 8 chunks, none below 256 tokens, so that skipping those without weight pays.

    Args:
        objective: with `chunk_tokens` and `chunk_mib`.
        n: tokens of a device.
        columns: of the vocabulary that the device holds.
        backend: as jax names it; by default the one in use.
    """
    if objective.chunk_tokens != "auto":
        return max(1, min(objective.chunk_tokens, n))
    budget = objective.chunk_mib * 2**20 or _bytes(CHUNK_MIB, backend)
    tokens = min(budget // (4 * columns * COPIES), max(256, n // 8))
    return max(1, min(max(64, tokens // 64 * 64), n))


def block_size(chunk: int, columns: int, backend: str | None = None) -> int:
    """Return how many of a chunk's tokens make a block: the most that divide it and fit `BLOCK_MIB`."""
    fits = max(1, _bytes(BLOCK_MIB, backend) // (4 * columns))
    return next(rows for rows in range(min(fits, chunk), 0, -1) if chunk % rows == 0)


def product_columns(d: int, columns: int, backend: str | None = None) -> int:
    """Return how many columns of a [d, columns] product fit `PRODUCT_MIB`."""
    return min(columns, max(1, _bytes(PRODUCT_MIB, backend) // (4 * d)))


def _bytes(mib: dict[str, int], backend: str | None) -> int:
    return 2**20 * mib.get(backend or environment.backend(), mib["other"])
