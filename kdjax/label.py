"""The teacher run once over a run's data, and what it says kept: `kdjax label`, which goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdjax import __version__
from kdjax.answers import answered
from kdjax.build import build
from kdjax.config import Config, load
from kdjax.console import duration
from kdjax.data.cache import (
    MANIFEST,
    VERSION,
    damaged,
    of_manifest,
    of_record,
    open_cache,
    record,
    shard_name,
    write_shard,
)
from kdjax.data.packing import SAID, Row, to_batch
from kdjax.data.shards import local_rows
from kdjax.data.signals import Settings, error, packed
from kdjax.errors import UserError
from kdjax.fields import differences_of
from kdjax.job import Job
from kdjax.labelled import check, wanted_of
from kdjax.lock import lock_run
from kdjax.metrics import write_json
from kdjax.remote import Wanted, asking
from kdjax.shapes import Batch
from kdjax.teacher import Saying, speaking

log = logging.getLogger(__name__)

Manifest = dict[str, Any]
Speak = Callable[[list[Row], Batch, int], Callable[[], Sequence[Mapping[str, np.ndarray]]]]
"""Of a batch, as rows and as `to_batch` makes it, and its number in the split: begins to ask, and what comes back waits
for what the teacher says of each row."""
CONFIG = "config.json"


class Part(NamedTuple):
    """A process's part of the work.

    Attributes:
        index: which part.
        count: how many there are.
        writes: whether this process writes it; processes that read the same rows are several.
    """

    index: int
    count: int
    writes: bool


def label(config: Config, directory: Path) -> Manifest:
    """Return the manifest of a cache of what the teacher says to a config's training and held-out rows.

    Args:
        config: whose training is to read it, with its `label`.
        directory: of the cache; made where it is not there.

    Raises:
        UserError: a config without a teacher, an objective that could not be had of such a cache, or one in the
            directory that came about otherwise.
        OSError: a shard cannot be written; what is there stays valid, and labelling goes on from there.
    """
    config = replace(config, cache="")
    check(config)
    directory.mkdir(parents=True, exist_ok=True)
    with lock_run(directory):
        job = build(config, answered(config, directory))
        wanted = wanted_of(job)
        part = _part(job)
        finished = directory / MANIFEST
        if finished.exists():
            cache = of_manifest(directory)
            if different := differences_of({name: cache.manifest.get(name) for name in wanted}, wanted):
                raise UserError(_otherwise(directory, different))
            if not (broken := damaged(cache)):
                log.info("%s is labelled already", directory)
                return cache.manifest
            for name in broken:
                (directory / name).unlink(missing_ok=True)
            log.info("%s: damaged, and written anew", ", ".join(broken))
        done = _done(directory / f"part-{part.index:03d}.json", wanted)
        for split in ("held_out", "train"):
            _write(job, directory, part, wanted, done, split)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("all parts are labelled")
        if jax.process_index() == 0:
            _finish(job, directory, wanted, part)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the manifest is written")
    return open_cache(directory).manifest


def _part(job: Job) -> Part:
    """Return this process's part: of processes that read the same rows, the first writes."""
    index, count = job.place.reading
    all_of = multihost_utils.process_allgather(np.int32(index)) if jax.process_count() > 1 else np.array([index])
    return Part(index, count, int(np.argmax(np.ravel(all_of) == index)) == jax.process_index())


def _otherwise(directory: Path, different: list[str]) -> str:
    return (
        f"{directory} was labelled otherwise (there -> here: {'; '.join(different[:4])}); choose another directory, or "
        "delete it"
    )


def _done(path: Path, wanted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the shards that this process has written, by name.

    Raises:
        UserError: they came about otherwise.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        different = differences_of(found["wanted"], wanted)
        shards = {shard["name"]: shard for shard in found["shards"]}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} is damaged ({problem}); delete {path.parent} and label anew") from None
    if different:
        raise UserError(_otherwise(path.parent, different))
    return {name: shard for name, shard in shards.items() if _is_whole(path.parent / name, shard)}


def _is_whole(path: Path, shard: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == shard["bytes"]


def _turns(job: Job, split: str, first: int, state: Any) -> Iterator[tuple[list[Row], Any]]:
    """Yield the rows of each batch of a split from the first on, and where training's data goes on after each."""
    if split == "train":
        return job.data.rows(state)
    return ((rows, None) for rows in job.data.evaluation_rows(job.config.batch_size)[first:])


def _write(job: Job, directory: Path, part: Part, wanted: dict[str, Any], done: dict[str, Any], split: str) -> None:
    """Write the shards of a split that this process has not written yet, and note each in its part's file."""
    each, parts = wanted["shard_batches"], directory / f"part-{part.index:03d}.json"
    held_out = len(job.data.evaluation_rows(job.config.batch_size))
    batches = wanted["batches"] if split == "train" else held_out
    names = [shard_name(split, number, part.index, part.count) for number in range(-(-batches // each))]
    left = _left([name not in done for name in names])
    if not left:
        return
    if len(left) < len(names):
        log.info("%s: %d of its %d shards are there already", split, len(names) - len(left), len(names))
    began, turns, at = 0.0, None, -1
    with _speaker(job, wanted["kept"][split]) as speak:
        for finished, number in enumerate(left):
            if turns is None or at != number:
                state = done[names[number - 1]]["after"] if number else None
                turns = _turns(job, split, number * each, state)
            some = [next(turns) for _ in range(min(each, batches - number * each))]
            began = began or time.perf_counter()
            contents, facts = _records(job, split, speak, [rows for rows, _ in some], number * each, wanted)
            if part.writes:
                done[names[number]] = write_shard(directory / names[number], contents) | facts | {"after": some[-1][1]}
                write_json(parts, {"wanted": wanted, "shards": list(done.values())})
            at, spent = number + 1, time.perf_counter() - began
            eta = duration(spent / (finished + 1) * (len(left) - finished - 1))
            log.info("%s: %d of %d batches, eta %s", split, number * each + len(some), batches, eta)


def _left(is_missing: list[bool]) -> list[int]:
    """Return the numbers of the shards that some process lacks: all run the teacher for these, so that none waits."""
    missing = np.array(is_missing, bool)
    if jax.process_count() > 1:
        missing = np.any(multihost_utils.process_allgather(missing), axis=0)
    return np.flatnonzero(missing).tolist()


@contextmanager
def _speaker(job: Job, kept: dict[str, Any]) -> Iterator[Speak]:
    """Give what says what is kept of the teacher: its placed program, or what asks its server.

    Raises:
        UserError: a server, but a student that does not predict next tokens, of which it tells.
    """
    if job.teacher is None:
        name, task = job.config.teacher_server.name, job.student.model.config.task
        if task != "causal_lm":
            raise UserError(
                f"the student is made for {task}, but {name} is asked for next tokens; label by a local one"
            )
        wanted = Wanted(kept["picks"], job.student.model.config.vocab_size)
        with asking(job.config.teacher_server, wanted, job.data.shared) as ask:
            yield lambda rows, batch, number: ask(rows)
        return
    frozen, size = job.frozen_teacher(), job.config.batch_size
    saying = Saying(kept["kind"], kept["picks"], kept["temperature"], job.config.label.seed)
    program = job.place.compile_rows(speaking(job.teacher.model, {}, job.config.microbatches, saying))
    own = np.array(local_rows(size, *job.place.reading), np.int32)

    def speak(rows: list[Row], batch: Batch, number: int) -> Callable[[], Sequence[Mapping[str, np.ndarray]]]:
        said = program(frozen, job.place.put_batch(replace(batch, signal={"row_B": own + number * size})))

        def by_row() -> list[dict[str, np.ndarray]]:
            arrays = job.place.own_rows(said["said"])
            return [{name: x[n] for name, x in arrays.items()} for n in range(len(rows))]

        return by_row

    yield speak


def _records(
    job: Job, split: str, speak: Speak, batches: list[list[Row]], first: int, wanted: dict[str, Any]
) -> tuple[list[bytes], dict[str, Any]]:
    """Return the records of some batches, and figures of them; while the host packs one, the teacher is at the next.

    Args:
        job: the run's.
        split: whose rows they are.
        speak: the teacher.
        batches: this process's rows of each.
        first: the number of the first of them.
        wanted: how it is kept.
    """
    kept = wanted["kept"][split]
    settings = Settings(job.student.model.config.vocab_size, kept["bits"], kept["picks"])
    records, facts, late = [], {"tokens": 0, "error": 0.0}, None

    def pack(rows: list[Row], batch: Batch, said: Callable[[], Sequence[Mapping[str, np.ndarray]]]) -> None:
        for n, (row, of_row) in enumerate(zip(rows, said(), strict=True)):
            count = int(np.sum(batch.kd_weight_BR[n] != 0))
            small = packed(kept["kind"], of_row, count, settings)
            records.append(record(row, small))
            facts["tokens"] += count
            facts["error"] = max(facts["error"], error(kept["kind"], of_row, small, settings))

    for number, rows in enumerate(batches, first):
        batch = to_batch(rows)
        said = speak(rows, batch, number)
        if late:
            pack(*late)
        late = rows, batch, said
    if late:
        pack(*late)
    return records, facts


def _finish(job: Job, directory: Path, wanted: dict[str, Any], part: Part) -> None:
    """Put the parts of all processes together into the manifest."""
    files = [directory / f"part-{n:03d}.json" for n in range(part.count)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{directory} lacks {', '.join(absent)}; all processes must write into one shared directory")
    parts = [json.loads(file.read_text("utf-8")) for file in files]
    shards = sorted((shard for one in parts for shard in one["shards"]), key=lambda shard: shard["name"])
    train = [shard for shard in shards if shard["name"].startswith("train-")]
    tokens, size = (sum(shard[name] for shard in train) for name in ("tokens", "bytes"))
    figures = ("train_documents", "held_out_documents", "held_out_dropped")
    told = {name: getattr(job.data, name) for name in figures} | {"held_out_sha256": job.data.held_out_hash}
    manifest: Manifest = {
        "version": VERSION,
        "kdjax": __version__,
        **wanted,
        "vocab_size": job.student.model.config.vocab_size,
        "tokens": tokens,
        "row_tokens": replace(job.config.data, task=job.student.model.config.task).lengths["tokens"],
        "bytes_per_token": size / max(tokens, 1),
        "largest_error": max((shard["error"] for shard in train), default=0.0),
        "data": told,
        "shards": [{name: shard[name] for name in ("name", "rows", "bytes", "sha256")} for shard in shards],
        "sha256": hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest(),
    }
    write_json(directory / MANIFEST, manifest)
    write_json(directory / CONFIG, asdict(job.config))


def verified(directory: Path, batches: int) -> dict[str, Any]:
    """Return how far what a cache says of its first batches is from what the teacher says today.

    Raises:
        UserError: the data gives other rows, or the teacher is another one.
    """
    cache, config = open_cache(directory), load(str(directory / CONFIG))
    job = build(config, answered(config, directory))
    wanted, worst, others = wanted_of(job), 0.0, 0
    if different := differences_of(cache.manifest["settings"], wanted["settings"]):
        raise UserError(f"{directory}: the cache's -> today's: {'; '.join(different[:4])}")
    kind, settings = cache.settings("train")
    some = list(islice(job.data.rows(), min(batches, wanted["batches"])))
    with _speaker(job, wanted["kept"]["train"]) as speak:
        fresh, _ = _records(job, "train", speak, [rows for rows, _ in some], 0, wanted)
    for index, content in enumerate(fresh):
        now, then = of_record(content, kind, settings), cache.row("train", index)
        if any(not np.array_equal(now[name], then[name]) for name in now if not name.startswith(SAID)):
            raise UserError(f"{directory}: row {index} has other tokens than the data gives today; label anew")
        entries = [np.sort(one.get(f"{SAID}ids", np.zeros((1, 1)))) for one in (now, then)]
        others += int(np.any(entries[0] != entries[1], axis=1).sum())
        name = f"{SAID}{'hidden' if kind == 'hidden' else 'log_probs'}"
        worst = max(worst, float(np.abs(now[name].astype(np.float32) - then[name].astype(np.float32)).max()))
    return {"verified_rows": len(fresh), "largest_difference": worst, "tokens_of_other_entries": others}
