"""Where text comes from. A source is random access to raw rows, so that they can be shuffled, dealt and resumed.

To add one: a function of the part after the colon that returns a `Source`, and a row in `SOURCES` at the foot.
"""

from __future__ import annotations

import glob
import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.data.invented import facts
from kdjax.data.python_docs import documents, passages, questions
from kdjax.errors import UserError, did_you_mean

Record = Mapping[str, Any]
"""A raw row: column name to value."""

_PARAGRAPHS, _LINES = 2_000, 8_000
"""A text document ends at a blank line after so many bytes, or at any line's end after so many."""


@dataclass(frozen=True)
class Source:
    """Random access to raw rows.

    Attributes:
        name: as the config names it.
        count: number of rows.
        record: the columns of row i; raises UserError where it cannot be read.
        where: file and row number of row i, for messages.
    """

    name: str
    count: int
    record: Callable[[int], Record]
    where: Callable[[int], str]


def open_source(name: str) -> Source:
    """Return the source called `KIND` or `KIND:ARGUMENT`.

    Raises:
        UserError: an unknown kind, a path with no file, or no rows.
    """
    kind, _, argument = name.partition(":")
    if kind not in SOURCES:
        raise UserError(f"unknown data source {name!r}{did_you_mean(kind, SOURCES)}")
    source = SOURCES[kind](argument)
    if source.count == 0:
        raise UserError(f"data source {name!r} is empty; give a file with at least one row")
    return source


def _installed(name: str, rows_of: Callable[[], Sequence[Record]], argument: str) -> Source:
    if argument:
        raise UserError(f"data source {name} takes no argument, got {argument!r}")
    rows = rows_of()
    return Source(name, len(rows), lambda i: rows[i], lambda i: f"{name} {rows[i]['id']}")


def _invented(argument: str) -> Source:
    if not argument.isdecimal() and argument:
        raise UserError(f"data source invented:{argument} has no such seed; write invented, or invented:7 for another")
    rows = facts(int(argument or 0))
    return Source("invented", len(rows), lambda i: rows[i], lambda i: f"invented {rows[i]['id']}")


def _files(kind: str, argument: str) -> list[Path]:
    paths = sorted(Path(path) for path in glob.glob(str(Path(argument).expanduser()), recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not argument or not paths:
        raise UserError(f"data source {kind}:{argument} names no file; write {kind}:PATH, where PATH may be a glob")
    return paths


def _json_rows(data: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, line number) of each line that is not blank."""
    for start, end, line in _lines(data):
        if data[start:end].strip():
            yield start, end, line


def _text_rows(data: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, line number) of each document: whole paragraphs together, long ones cut at a line's end."""
    begin, first = 0, 1
    for start, end, line in _lines(data):
        blank = not data[start:end].strip()
        if (blank and end - begin >= _PARAGRAPHS) or end - begin >= _LINES:
            yield begin, end, first
            begin, first = end, line + 1
    if data[begin:].strip():
        yield begin, len(data), first


def _lines(data: mmap.mmap) -> Iterator[tuple[int, int, int]]:
    start, line = 0, 1
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield start, end, line
        start, line = end, line + 1


def _mapped(kind: str, argument: str, find: Callable[[mmap.mmap], Iterator], parse: Callable[[str], Record]) -> Source:
    """Return a source of pieces of memory-mapped files; only their bounds are held in memory."""
    paths = [path for path in _files(kind, argument) if path.stat().st_size]
    maps = []
    for path in paths:
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    found = [
        np.array([(number, *row) for row in find(data)], np.int64).reshape(-1, 4) for number, data in enumerate(maps)
    ]
    rows = np.concatenate([np.zeros((0, 4), np.int64), *found])

    def where(i: int) -> str:
        return f"{paths[rows[i, 0]]} line {rows[i, 3]}"

    def record(i: int) -> Record:
        file, start, end, line = (int(value) for value in rows[i])
        raw = maps[file][start:end]
        try:
            return parse(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            line += raw[: error.start].count(b"\n")
            raise UserError(
                f"{paths[file]} line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where(i)}: not a JSON object ({error})") from None

    return Source(f"{kind}:{argument}", len(rows), record, where)


def _json_object(line: str) -> Record:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"got a {type(value).__name__}")
    return value


def _parquet(argument: str) -> Source:
    """Return the rows of Parquet files, whose tables are held in memory in Arrow's form."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: python -m pip install 'kdjax[parquet]'") from None
    paths, tables = _files("parquet", argument), []
    for path in paths:
        try:
            tables.append(parquet.read_table(path, memory_map=True))
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from None
    ends = np.cumsum([table.num_rows for table in tables])

    def locate(i: int) -> tuple[int, int]:
        file = int(np.searchsorted(ends, i, side="right"))
        return file, i - (int(ends[file - 1]) if file else 0)

    def where(i: int) -> str:
        file, row = locate(i)
        return f"{paths[file]} row {row + 1}"

    def record(i: int) -> Record:
        file, row = locate(i)
        table = tables[file]
        try:
            return {name: table.column(name)[row].as_py() for name in table.column_names}
        except UnicodeDecodeError as error:
            raise UserError(f"{where(i)}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None

    return Source(f"parquet:{argument}", int(ends[-1]), record, where)


def _tfds(argument: str) -> Source:
    from kdjax.data.tfds import open_prepared  # a second to import, and few runs need it

    name, _, split = argument.partition("@")
    rows: Sequence[Record] = open_prepared(name, split or "train")
    return Source(f"tfds:{argument}", len(rows), lambda i: rows[i], lambda i: f"tfds:{argument} row {i + 1}")


SOURCES: dict[str, Callable[[str], Source]] = {
    "python_docs": partial(_installed, "python_docs", documents),
    "python_questions": partial(_installed, "python_questions", questions),
    "python_passages": partial(_installed, "python_passages", passages),
    "invented": _invented,
    "text": lambda argument: _mapped("text", argument, _text_rows, lambda text: {"text": text.strip()}),
    "jsonl": lambda argument: _mapped("jsonl", argument, _json_rows, _json_object),
    "parquet": _parquet,
    "tfds": _tfds,
}
