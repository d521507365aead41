"""How the data is dealt to processes: a number of shards that depends on the batch alone, read in turn.

So each process keeps the places of its own shards only, and their number may change between runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdjax.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Which shard fills which row of which step, and which of them are this process's.

    Attributes:
        batch_size: rows of a step, of all processes together.
        shards: in all: a multiple of the batch size, or a divisor of it.
        process_index: of this process.
        process_count: processes in all.
    """

    batch_size: int
    shards: int
    process_index: int = 0
    process_count: int = 1

    def turn(self, step: int) -> dict[int, int]:
        """Return this process's shards for a step, in order, with how many rows each gives."""
        each = max(1, self.batch_size // self.shards)
        first = step % max(1, self.shards // self.batch_size) * self.batch_size
        rows = local_rows(self.batch_size, self.process_index, self.process_count)
        return {first + row // each: each for row in rows[::each]}

    @property
    def own(self) -> list[int]:
        """All shards that this process ever reads."""
        rounds = max(1, self.shards // self.batch_size)
        return sorted(shard for step in range(rounds) for shard in self.turn(step))


def lay_out(batch_size: int, most: int, process_index: int, process_count: int) -> Layout:
    """Return the layout with the most shards, up to `most`.

    Raises:
        UserError: the batch or its shards do not split over the processes.
    """
    local_rows(batch_size, process_index, process_count)
    if most >= batch_size:
        shards = batch_size * (most // batch_size)
    else:
        shards = max(number for number in range(1, most + 1) if batch_size % number == 0)
    if shards < batch_size and shards % process_count:
        raise UserError(
            f"batch_size {batch_size} over at most {most} data shards makes {shards}, which do not split over "
            f"{process_count} processes; use another batch_size, fewer processes, or more documents and data.max_shards"
        )
    return Layout(batch_size, shards, process_index, process_count)


def local_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """Return the rows of a global batch that are this process's.

    Raises:
        UserError: the batch does not split over the processes.
    """
    if batch_size < 1 or batch_size % process_count:
        below = batch_size // process_count * process_count
        near = f"{below} or {below + process_count}" if below > 0 else f"{process_count}"
        raise UserError(f"batch_size {batch_size} does not split over {process_count} processes; use {near}")
    each = batch_size // process_count
    return range(process_index * each, (process_index + 1) * each)
