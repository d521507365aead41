"""What was paid for, a line of JSON each, so that a job that was killed goes on without paying again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdjax.errors import UserError
from kdjax.prompts.speaker import How, Said, Speaker, Weighed

Row = dict[str, Any]


class Journal:
    """Rows by the values of their key fields, in memory and in a file."""

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        """Read what is there; a last line that a kill has torn is removed.

        Raises:
            UserError: a damaged line before the last.
        """
        self._path, self._key, self._rows = path, tuple(key), dict[tuple[Any, ...], Row]()
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} line {number} is damaged: {line[:40]!r}; delete it and try again") from None
        if whole != data:
            os.truncate(path, len(whole))

    def _keep(self, row: Row) -> None:
        self._rows[tuple(row[name] for name in self._key)] = row

    def get(self, *key: Any) -> Row | None:
        """Return the row of a key, or None."""
        return self._rows.get(key)

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows; they are on their way to the disk together before this returns."""
        rows = list(rows)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._path.open("ab", buffering=0) as file:
            file.write(lines.encode("utf-8", "surrogatepass"))
        for row in rows:
            self._keep(row)


class Remembering:
    """A speaker whose answers are kept in a journal: the same question is asked once."""

    def __init__(self, speaker: Speaker, journal: Journal, batch_size: int) -> None:
        self._speaker, self._journal, self._batch_size = speaker, journal, batch_size

    @property
    def name(self) -> str:
        """What a user calls it."""
        return self._speaker.name

    def say(self, prompts: Sequence[str], how: How) -> list[Said]:
        """Return what it says to each prompt, batch by batch; a batch is asked as a whole, so its draws are the same.

        Draws go by the batch's number too.
        """
        said: list[Said] = []
        for first in range(0, len(prompts), self._batch_size):
            batch = list(prompts[first : first + self._batch_size])
            key = _hash([self.name, batch, asdict(how), first])
            row = self._journal.get(key)
            if row is None:
                answers = self._speaker.say(batch, How(how.max_new_tokens, how.stop, how.sampling, how.seed + first))
                row = {"key": key, "speaker": self.name, "said": [list(answer) for answer in answers]}
                self._journal.add([row])
            said += [Said(*answer) for answer in row["said"]]
        return said

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[Weighed]:
        """Return what the speaker does, which is not kept."""
        return self._speaker.weigh(pairs)


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=10).hexdigest()


def plain(row: Mapping[str, Any]) -> Row:
    """Return a row whose numbers have six digits, so that a value read again is the value written."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
