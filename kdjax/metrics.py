"""What a run measures, on the host: means of sums, throughput, and who writes it down (JSONL, TensorBoard, console).

A row is one flat dict of numbers; those of an evaluation begin with ``eval_``. A writer is anything with
``write(step, row)`` and ``close()``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from kdjax.console import Progress
from kdjax.errors import UserError

Row = Mapping[str, Any]

METRICS = "metrics.jsonl"
"""The file's name in a run directory."""


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Return the mean of each (sum, weight) pair, NaN where the weight is 0, and perplexities of cross entropies.

    A name with the word ``ce`` in it gets a neighbour: ``teacher_ce`` gives ``teacher_perplexity`` =
    exp(summed CE / token count). So the sums must be those of the whole split; a mean of means is another number.
    """
    result: dict[str, float] = {}
    for name, (total, weight) in sums.items():
        mean = float(total) / float(weight) if float(weight) else math.nan
        result[name] = mean
        words = name.split("_")
        if "ce" in words:
            result["_".join("perplexity" if word == "ce" else word for word in words)] = _exp(mean)
    return result


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


class Throughput:
    """Tokens a second over a window of the latest steps, and the time left at that rate; both NaN until known.

    The first step compiles, so its tick only starts the clock.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ticks: deque[tuple[float, int]] = deque(maxlen=window + 1)

    def tick(self, tokens: int) -> float:
        """Return tokens a second, now that a step of `tokens` has ended."""
        self._ticks.append((self._clock(), tokens))
        seconds = self._ticks[-1][0] - self._ticks[0][0]
        return sum(tokens for _, tokens in list(self._ticks)[1:]) / seconds if seconds > 0 else math.nan

    def eta(self, steps_left: int) -> float:
        """Return the seconds that `steps_left` more steps take."""
        if len(self._ticks) < 2:
            return math.nan
        return (self._ticks[-1][0] - self._ticks[0][0]) / (len(self._ticks) - 1) * steps_left

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside (an evaluation, say)."""
        begin = self._clock()
        try:
            yield
        finally:
            gap = self._clock() - begin
            self._ticks = deque(((t + gap, tokens) for t, tokens in self._ticks), self._ticks.maxlen)


class Writer(Protocol):
    """Where rows go."""

    def write(self, step: int, row: Row) -> None:
        """Take the row of a step."""

    def close(self) -> None:
        """Finish; no row comes after."""


class JsonlWriter:
    """Appends one JSON object a row; each is on its way to the disk before `write` returns.

    NaN and infinities, which JSON has not, are written as null.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, row: Row) -> None:
        """Append the row, its step first."""
        plain = {"step": int(step)} | {name: _plain(value) for name, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, whole or not at all; NaN and infinities, which JSON has not, are written as null."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(_plain(value), indent=2, allow_nan=False) + "\n", "utf-8")
    os.replace(beside, path)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: numbers of numpy and jax become Python's."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, null as NaN; empty where there is no file. A torn last line is left out.

    Raises:
        UserError: a damaged line before the last.
    """
    return [
        {name: math.nan if value is None else value for name, value in row.items()} for _, row in _lines(Path(path))
    ]


def cut_back(path: Path, step: int) -> None:
    """Remove the rows after `step`, and a torn last line; whole or not at all, whenever the process is killed.

    Raises:
        UserError: a damaged line before the last.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = b"".join(line + b"\n" for line, row in _lines(path) if row["step"] <= step)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a metrics file with its row."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # What follows the last newline: nothing, or a line torn by a kill.
                return
            raise UserError(
                f"{path} line {number} is damaged: wanted a JSON object with a step, got {line[:40]!r}; "
                "delete that line and try again"
            ) from None
        yield line, row


class TensorBoardWriter:
    """Writes events that TensorBoard shows; needs the extra `tensorboard`."""

    def __init__(self, directory: Path, start: int = 0) -> None:
        from tensorboardX import SummaryWriter

        # Of a run that is resumed, events from purge_step on are hidden.
        self._events = SummaryWriter(str(directory), purge_step=start + 1 if start else None, flush_secs=10)

    def write(self, step: int, row: Row) -> None:
        """Add one scalar for each number of the row, grouped into train and eval."""
        for name, value in row.items():
            if isinstance(_plain(value), (int, float)):
                tag = name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"
                self._events.add_scalar(tag, float(value), step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._events.close()


def open_writers(
    run_dir: Path,
    steps: int,
    eta: Callable[[int], float],
    *,
    start: int = 0,
    enabled: bool = True,
    console: Console | None = None,
) -> list[Writer]:
    """Return the writers of a run: JSONL, TensorBoard where it is installed, and the console's progress.

    Rows after `start` that an earlier process left are removed; a fresh run keeps none.

    Args:
        run_dir: exists already.
        steps: of the whole run.
        eta: seconds that so many steps take, `Throughput.eta`.
        start: the step that was restored; 0 for a fresh run.
        enabled: true on process 0 alone; elsewhere there are no writers.
        console: where progress is shown; by default standard output.
    """
    if not enabled:
        return []
    cut_back(run_dir / METRICS, start or -1)
    has_tensorboard = find_spec("tensorboardX") is not None
    return [
        JsonlWriter(run_dir / METRICS),
        *([TensorBoardWriter(run_dir / "tensorboard", start)] if has_tensorboard else []),
        Progress(steps, eta, start=start, console=console),
    ]
