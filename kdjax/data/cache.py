"""A teacher's cache on disk: packed rows with what the teacher said of them, in array_record shards, and a manifest.

A record is one row as safetensors: its tokens, and what `kdjax.data.signals` keeps of a signal. Rows lie in the order
in which training reads them. A shard holds some batches' rows of one process, and appears whole or not at all.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from kdjax.data.packing import SAID, Row
from kdjax.data.pipeline import Data
from kdjax.data.shards import lay_out
from kdjax.data.signals import Settings, unpacked
from kdjax.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1
EPOCHS = 2**20
"""More than any run reads."""


def record(row: Row, kept: Mapping[str, np.ndarray]) -> bytes:
    """Return a row as one record, with what is kept (`signals.packed`) of what the teacher said of it.

    The teacher's own view is left out, since it has spoken.
    """
    own = {name: _small(np.asarray(x)) for name, x in row.items() if not name.startswith("teacher_")}
    return safetensors.save(own | {f"{SAID}{name}": x for name, x in kept.items()})


def of_record(content: bytes, kind: str, settings: Settings) -> Row:
    """Return the row of a record; what the teacher said is there under names that begin with `SAID`."""
    arrays = safetensors.load(content)
    kept = {name.removeprefix(SAID): x for name, x in arrays.items() if name.startswith(SAID)}
    row = {name: x for name, x in arrays.items() if not name.startswith(SAID)}
    row = {name: x.astype(np.float32 if name == "weight" else np.int32) for name, x in row.items()}
    said = unpacked(kind, kept, len(row["tokens"]), settings)
    return row | {f"{SAID}{name}": x for name, x in said.items()}


def _small(x: np.ndarray) -> np.ndarray:
    """Return numbers as the smallest kind of unsigned ones that has them all, or as they are."""
    kinds = (kind for kind in (np.uint8, np.uint16, np.uint32) if x.size and np.array_equal(x.astype(kind), x))
    return x.astype(next(kinds, x.dtype))


def shard_name(split: str, number: int, part: int, parts: int) -> str:
    """Return the file name of a shard: its number among those of a process, and which process's."""
    return f"{split}-{number:05d}-{part:03d}-of-{parts:03d}.array_record"


def write_shard(path: Path, records: Sequence[bytes]) -> dict[str, Any]:
    """Write a shard, whole or not at all; return its entry in the manifest.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    draft = path.with_name(f"{path.name}.draft")
    try:
        try:
            writer = array_record_module.ArrayRecordWriter(str(draft), "group_size:1,zstd:3")
            for content in records:
                writer.write(content)
            writer.close()
        except RuntimeError as error:  # the library's own class for a disk that is full
            raise OSError(f"{path} cannot be written: {error}") from error
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        entry = {"name": path.name, "rows": len(records), "bytes": draft.stat().st_size, "sha256": digest(draft)}
        os.replace(draft, path)
        return entry
    finally:
        draft.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Cache:
    """A finished cache.

    Attributes:
        directory: where it lies.
        manifest: what it is of, and its shards.
    """

    directory: Path
    manifest: dict[str, Any]

    @functools.cached_property
    def _readers(self) -> tuple[dict[str, Any], threading.Lock]:
        return {}, threading.Lock()

    @functools.cached_property
    def _counts(self) -> collections.Counter[str]:
        counts = collections.Counter[str]()
        for shard in self.manifest["shards"]:
            counts[shard["name"].partition("-")[0]] += shard["rows"]
        return counts

    def count(self, split: str) -> int:
        """Return how many rows a split has."""
        return self._counts[split]

    def settings(self, split: str) -> tuple[str, Settings]:
        """Return the kind of what is said in a split, and how it is kept."""
        told = self.manifest["kept"][split]
        return told["kind"], Settings(self.manifest["vocab_size"], told["bits"], told["picks"])

    def row(self, split: str, index: int) -> Row:
        """Return a row by its place in the order of training.

        Raises:
            UserError: its shard is damaged.
        """
        size, parts, batches = (self.manifest[name] for name in ("batch_size", "parts", "shard_batches"))
        batch, place = divmod(index, size)
        part, own = divmod(place, size // parts)
        shard, ahead = divmod(batch, batches)
        return self.read(shard_name(split, shard, part, parts), ahead * (size // parts) + own, split)

    def read(self, name: str, number: int, split: str) -> Row:
        """Return a record of a shard.

        Raises:
            UserError: the shard is damaged.
        """
        readers, lock = self._readers
        path = self.directory / name
        try:
            with lock:
                if name not in readers:
                    readers[name] = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
                (content,) = readers[name].read([number])
            return of_record(content, *self.settings(split))
        except (RuntimeError, IndexError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged at record {number} ({str(error).splitlines()[0][:120]}); delete it and run "
                "`kdjax label` again, which writes what is not there"
            ) from error


def open_cache(directory: Path) -> Cache:
    """Return a finished cache, each of whose shards is there in its whole length.

    Raises:
        UserError: none, one that is not finished, or shards that are missing or of another length.
    """
    cache = of_manifest(directory)
    for shard in cache.manifest["shards"]:
        if why := _why_not_whole(directory, shard):
            raise UserError(f"{directory / shard['name']} {why}: run `kdjax label` again, which writes it anew")
    return cache


def of_manifest(directory: Path) -> Cache:
    """Return what a finished cache should be; its shards are not looked at.

    Raises:
        UserError: none, one that is not finished, or one of another version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        begun = any(directory.glob("part-*.json"))
        goes_on = "; labelling was begun there, and goes on with the same `kdjax label`" if begun else ""
        raise UserError(f"{directory} is no finished cache: it has no {MANIFEST}{goes_on}")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version, _ = manifest["version"], [(shard["name"], shard["bytes"]) for shard in manifest["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); label anew") from None
    if version != VERSION:
        raise UserError(f"{path} is of version {version}; this kdjax reads {VERSION}: label anew")
    return Cache(directory, manifest)


def _why_not_whole(directory: Path, shard: dict[str, Any]) -> str:
    file = directory / shard["name"]
    found = file.stat().st_size if file.is_file() else None
    if found == shard["bytes"]:
        return ""
    return f"{'is not there' if found is None else f'has {found:,} bytes'}; wanted {shard['bytes']:,} bytes"


def damaged(cache: Cache) -> list[str]:
    """Return the names of the shards that are not there as they were written."""

    def is_damaged(shard: dict[str, Any]) -> bool:
        return (
            bool(_why_not_whole(cache.directory, shard)) or digest(cache.directory / shard["name"]) != shard["sha256"]
        )

    return [shard["name"] for shard in cache.manifest["shards"] if is_damaged(shard)]


def inspected(directory: Path) -> dict[str, Any]:
    """Return what a cache holds: its manifest without the shards, how full its rows are, and which shards are damaged.

    Raises:
        UserError: as `open_cache` does.
    """
    cache = of_manifest(directory)
    manifest, rows = cache.manifest, cache.count("train")
    length, shards = manifest["row_tokens"], manifest["shards"]
    shown = {name: value for name, value in manifest.items() if name != "shards"}
    return shown | {
        "rows": rows,
        "held_out_rows": cache.count("held_out"),
        "fill": manifest["tokens"] / max(rows * length, 1),
        "bytes": sum(shard["bytes"] for shard in shards),
        "files": len(shards),
        "damaged": damaged(cache),
    }


@dataclass(frozen=True)
class _Rows:
    """The rows of training, epoch after epoch, as grain wants a source: the first in order, the others shuffled."""

    cache: Cache
    seed: int

    def __len__(self) -> int:
        return self.cache.count("train") * EPOCHS

    def __getitem__(self, index: int) -> Row:
        epoch, place = divmod(index, self.cache.count("train"))
        return self.cache.row("train", int(_order(self.cache.count("train"), self.seed, epoch)[place]))


@functools.lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows) if epoch else np.arange(rows)


def cached(cache: Cache, seed: int, *, batch_size: int, process_index: int = 0, process_count: int = 1) -> Data:
    """Return the data of a run that reads a cache, in batches of any size.

    Raises:
        UserError: a batch that does not split, or is larger than the cache, or a held-out shard that is damaged.
    """
    rows, manifest = cache.count("train"), cache.manifest
    if rows < batch_size:
        raise UserError(f"{cache.directory} has {rows} rows; wanted at least batch_size, {batch_size}")
    layout = lay_out(batch_size, batch_size, process_index, process_count)

    def shard(number: int) -> grain.IterDataset:
        own = grain.MapDataset.source(_Rows(cache, seed))[number :: layout.shards]
        return own.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    told = manifest["data"]
    return Data(
        layout=layout,
        shard=shard,
        held_out=tuple(cache.row("held_out", n) for n in range(cache.count("held_out"))),
        identity={"cache": manifest["sha256"], "batch_size": batch_size, "seed": seed},
        train_documents=told["train_documents"],
        held_out_documents=told["held_out_documents"],
        held_out_dropped=told["held_out_dropped"],
        held_out_hash=told["held_out_sha256"],
    )
