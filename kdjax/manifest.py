"""Which saved steps are whole: each holds the SHA-256 of its every file, since orbax restores a flipped byte silently.

A step is a directory named by its number. It gets that name last of all, so a directory that has it was once whole;
what a disk, a copy or a hand did to it later is what `verify` finds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

NAME = "manifest.json"


class Damaged(ValueError):
    """A step that is not what was saved; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """What a step held when it was saved."""

    files: dict[str, str]
    """File name, relative to the step -> SHA-256."""
    metric: float | None
    """The evaluation metric at this step (lower is better), if there was one."""

    @property
    def sha256(self) -> str:
        """The identity of what was saved: a hash of the files' hashes."""
        return _hash_text(self.files)


def unsealed(directory: Path, step: int) -> Path:
    """Return where a step is written until it is sealed."""
    return directory / f"{step}.unsealed"


def seal(directory: Path, step: int, metric: float | None) -> None:
    """Write the manifest of an unsealed step and give the step its name."""
    written = unsealed(directory, step)
    names = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    _write(written, Manifest(_hash_files(written, names), metric))
    written.rename(directory / str(step))


def set_metric(step_dir: Path, metric: float) -> None:
    """Give a sealed step its evaluation metric."""
    _write(step_dir, Manifest(read(step_dir).files, metric))


def read(step_dir: Path) -> Manifest:
    """Return the manifest of a step, without looking at the files that it names.

    Raises:
        Damaged: it is missing or is not what was written.
    """
    try:
        record = json.loads((step_dir / NAME).read_text())
        manifest = Manifest(record["files"], record["metric"])
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{NAME} is unreadable: {error}") from None
    if record.get("sha256") != _hash_text([manifest.files, manifest.metric]):
        raise Damaged(f"{NAME} differs from its own SHA-256")
    return manifest


def verify(step_dir: Path) -> Manifest:
    """Return the manifest of a step, having read and compared every file that it names.

    Raises:
        Damaged: naming the first file that is missing or differs.
    """
    manifest = read(step_dir)
    found = _hash_files(step_dir, manifest.files)
    for name, sha in manifest.files.items():
        if name not in found:
            raise Damaged(f"{name} is missing")
        if found[name] != sha:
            raise Damaged(f"{name} differs from its SHA-256")
    return manifest


def step_numbers(directory: Path) -> list[int]:
    """Return the numbers of the steps in `directory`, ascending; an empty directory is no step."""
    if not directory.is_dir():
        return []
    named = (path for path in directory.iterdir() if path.name.isdecimal() and str(int(path.name)) == path.name)
    return sorted(int(path.name) for path in named if path.is_dir() and any(path.iterdir()))


def sealed(directory: Path) -> dict[int, Manifest]:
    """Return the manifests of the steps that have one, ascending."""
    found = {}
    for step in step_numbers(directory):
        try:
            found[step] = read(directory / str(step))
        except Damaged:
            continue
    return found


def best_step(directory: Path) -> int | None:
    """Return the step with the lowest metric, the newest of equals; None where no step has a metric."""
    metrics = {step: manifest.metric for step, manifest in sealed(directory).items() if manifest.metric is not None}
    return min(metrics, key=lambda step: (metrics[step], -step), default=None)


def first_whole(directory: Path, steps: Iterable[int]) -> tuple[int | None, dict[int, str]]:
    """Return the first of `steps` that is whole, or None, and what is damaged in those before it."""
    damaged = {}
    for step in steps:
        try:
            verify(directory / str(step))
        except Damaged as error:
            damaged[step] = str(error)
        else:
            return step, damaged
    return None, damaged


def set_aside(directory: Path, step: int) -> None:
    """Rename a damaged step to ``120.damaged``, so that its number is free for another save."""
    aside = directory / f"{step}.damaged"
    shutil.rmtree(aside, ignore_errors=True)
    (directory / str(step)).rename(aside)


def clean(directory: Path) -> None:
    """Make `directory` and remove what killed saves left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob("*.unsealed*"):
        shutil.rmtree(path)


def prune(directory: Path, keep: int, keep_best: bool) -> None:
    """Delete all but the newest `keep` sealed steps and, with `keep_best`, the best one."""
    kept = set(list(sealed(directory))[-keep:]) | ({best_step(directory)} if keep_best else set())
    for step in set(step_numbers(directory)) - kept:
        step_dir = directory / str(step)
        (step_dir / NAME).unlink(missing_ok=True)  # first, so that a deletion cut short leaves no sealed step
        shutil.rmtree(step_dir)


def _write(step_dir: Path, manifest: Manifest) -> None:
    record = {
        "files": manifest.files,
        "metric": manifest.metric,
        "sha256": _hash_text([manifest.files, manifest.metric]),
    }
    partial = step_dir / f"{NAME}.partial"
    with partial.open("w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(step_dir / NAME)


def _hash_files(step_dir: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of those of `names` that are files."""
    present = [name for name in names if (step_dir / name).is_file()]
    with ThreadPoolExecutor() as pool:
        return dict(zip(present, pool.map(lambda name: _hash_file(step_dir / name), present), strict=True))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_text(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
