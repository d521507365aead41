"""Orbax behind one thin face: state, data iterator and config are saved and restored together.

The state is saved as one flat dictionary from path to array, so that no node type of the tree can be lost on the way.
Orbax writes a step under the name ``120.unsealed``; it is called ``120`` once its manifest is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from kdjax import manifest
from kdjax.errors import UserError

SOURCE = re.compile(r".* (?=[0-9a-f]{64}$)")
"""What stands before a SHA-256: the same tree may be read from elsewhere."""

log = logging.getLogger(__name__)
# Orbax reports to the console through absl; what matters of it is raised here.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and which saves are kept."""

    every: int = 100
    """Steps from one save to the next."""
    keep: int = 2
    """How many of the newest saves are kept."""
    keep_best: bool = True
    """Keep the save with the lowest evaluation loss too."""

    def __post_init__(self):
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint {name} is {getattr(self, name)}; wanted 1 or more")


@dataclass(frozen=True)
class Restored:
    """A saved step, back again."""

    step: int
    state: Any
    iterator_state: dict[str, Any]
    """As saved, with the shards of all processes."""
    config_json: str


@dataclass(frozen=True)
class OpenedParams:
    """The student of a run, as a model."""

    params: dict[str, Any]
    """A nested dict of numpy arrays, in the dtype they were saved in."""
    step: int
    sha256: str
    """The identity of the saved step."""


class Checkpoints:
    """The saved steps of one run; every process of a job makes one and calls it alike.

    Args:
        directory: the run's ``checkpoints``; made when missing. Files that a killed save left there are removed.
        config: when to save and what to keep.
        frozen: name -> ``"SOURCE SHA256"`` of each tree that the run uses but does not save (the teacher): named
            in every step and compared at restore, where a SHA-256 decides and not where it was read from.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, frozen: dict[str, str] | None = None):
        self._directory = Path(directory).absolute()
        self._config = config
        self._frozen = frozen or {}
        self._checkpointer = ocp.AsyncCheckpointer(_handler())
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._saved: int | None = None
        if jax.process_index() == 0:
            try:
                manifest.clean(self._directory)
            except OSError as error:
                raise UserError(f"checkpoints cannot be kept in {self._directory}: {error}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(
        self, step: int, state: Any, iterator_state: dict[str, Any], config_json: str, metric: float | None = None
    ) -> None:
        """Start saving a step in the background; the state may be donated as soon as this returns.

        A step that this object saved or restored last is not written again; it only gets its `metric`.

        Args:
            step: later than every saved step.
            state: a pytree of jax arrays.
            iterator_state: what this process needs to go on with the data, as JSON (so keys come back as strings).
                Where there are several processes, their ``"shards"`` (shard number -> state) are saved as one.
            config_json: the resolved config.
            metric: the evaluation loss at this step; one that is not finite counts as none.

        Raises:
            UserError: the save before it failed, this one cannot start, or there is a later step.
        """
        self.wait()
        metric = metric if metric is not None and math.isfinite(metric) else None
        if step == self._saved:
            if metric is not None and jax.process_index() == 0:
                manifest.set_metric(self._directory / str(step), metric)
            return
        newest = max(manifest.step_numbers(self._directory), default=-1)
        if step <= newest:
            raise UserError(
                f"step {step} cannot be saved in {self._directory}, which holds step {newest}; go on from that one, or"
                " choose another run directory"
            )
        leaves = _flatten(state)
        run = {
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            "iterator": _gather(iterator_state),
            "config": config_json,
            "frozen": self._frozen,
        }
        with self._failing_as_user_error(step):
            self._checkpointer.save(
                manifest.unsealed(self._directory, step),
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), run=ocp.args.JsonSave(run)),
                force=True,
            )
        self._saving = step, self._background.submit(self._commit, step, metric)

    def check(self) -> None:
        """Look, without waiting, whether the save in the background has failed.

        Raises:
            UserError: it has.
        """
        if self._saving and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being saved any more.

        Raises:
            UserError: the save failed.
        """
        if self._saving is None:
            return
        step, future = self._saving
        try:
            with self._failing_as_user_error(step):
                future.result()
        finally:
            if future.done():  # it is not where an interrupt ended the wait: close() shall wait again
                self._saving = None
        self._saved = step

    def close(self) -> None:
        """Wait for the save in the background and free its threads.

        Raises:
            UserError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def restore(self, abstract_state: Any) -> Restored | None:
        """Return the newest whole step, or None where nothing was saved yet; newer, damaged steps are set aside.

        Args:
            abstract_state: the wanted pytree, of ``jax.ShapeDtypeStruct`` with shardings, on any mesh.

        Raises:
            UserError: no step is whole, or a saved path, shape, dtype or frozen tree differs from the wanted one.
        """
        self.wait()
        step = self._newest_whole()
        if step is None:
            return None
        step_dir = self._directory / str(step)
        run = self._checkpointer.restore(step_dir, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        wanted = _flatten(abstract_state)
        _refuse_differences(run["frozen"], self._frozen, step)
        _refuse_differences(run["leaves"], {name: _describe(leaf) for name, leaf in wanted.items()}, step)
        args = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
        leaves = self._checkpointer.restore(step_dir, args=ocp.args.Composite(state=args))["state"]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in wanted])
        self._saved = step
        return Restored(step, state, run["iterator"], run["config"])

    def best_step(self) -> int | None:
        """Return the saved step with the lowest metric, or None where none has one."""
        return manifest.best_step(self._directory)

    def _commit(self, step: int, metric: float | None) -> None:
        """Seal the step that orbax is writing, and only then delete older ones."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            manifest.seal(self._directory, step, metric)
            manifest.prune(self._directory, self._config.keep, self._config.keep_best)

    def _newest_whole(self) -> int | None:
        """Return the step to restore, which process 0 chooses for all, having set aside newer, damaged ones."""
        step, damaged = None, {}
        if jax.process_index() == 0:
            steps = manifest.step_numbers(self._directory)
            step, damaged = manifest.first_whole(self._directory, reversed(steps))
            for number, what in damaged.items() if step is not None else ():
                log.warning("step %d in %s is damaged: %s; renamed %d.damaged", number, self._directory, what, number)
                manifest.set_aside(self._directory, number)
        chosen = np.array([-1 if step is None else step, len(damaged)], np.int32)
        if jax.process_count() > 1:
            chosen = multihost_utils.broadcast_one_to_all(chosen)
        if chosen[0] < 0 and chosen[1]:
            raise _none_whole(self._directory, damaged)
        return None if chosen[0] < 0 else int(chosen[0])

    @contextlib.contextmanager
    def _failing_as_user_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise UserError(
                f"step {step} was not saved in {self._directory}: {type(error).__name__}: {why}; mend that and run the"
                " same command again to go on from the newest saved step"
            ) from error


def open_params(run_dir: Path, step: int | None = None) -> OpenedParams:
    """Return ``params["student"]`` of a run's saved step, on the host.

    Args:
        run_dir: a run directory.
        step: by default the best, where there was an evaluation, otherwise the newest whole one.

    Raises:
        UserError: there is no such step, or it is damaged.
    """
    directory = Path(run_dir).absolute() / "checkpoints"
    steps = manifest.step_numbers(directory)
    if not steps:
        raise UserError(f"{run_dir} has no saved step in checkpoints/; train it first")
    if step is not None and step not in steps:
        raise UserError(f"{run_dir} has no saved step {step}; it has {', '.join(map(str, steps))}")
    best = manifest.best_step(directory)
    ordered = [step] if step is not None else sorted(steps, key=lambda number: (number == best, number), reverse=True)
    chosen, damaged = manifest.first_whole(directory, ordered)
    if chosen is None:
        raise _none_whole(directory, damaged)
    for number, what in damaged.items():
        log.warning("step %d in %s is damaged: %s; step %d is taken", number, directory, what, chosen)
    step_dir = directory / str(chosen)
    params = _restore_subtree(step_dir, "params/student/")
    if not params:
        raise UserError(f"step {chosen} in {directory} holds no params/student; it was not saved by kdjax train")
    return OpenedParams(params, chosen, manifest.read(step_dir).sha256)


def _handler() -> ocp.CompositeCheckpointHandler:
    """Return what writes and reads a step: uncompressed, since zstd saves 8 % of such floats for 4 times the time."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
    registry.add("state", ocp.args.PyTreeSave, arrays)
    registry.add("state", ocp.args.PyTreeRestore, arrays)
    return ocp.CompositeCheckpointHandler(handler_registry=registry)


def _flatten(tree: Any) -> dict[str, Any]:
    """Return the tree's leaves by path (``params/student/embed/embedding``), in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _refuse_differences(saved: dict[str, str], wanted: dict[str, str], step: int) -> None:
    """Raise if a name is on one side only, or what is said of it differs other than in a source before a SHA-256."""

    def compare(name: str) -> str | None:
        if name not in saved:
            return f"{name} is wanted but not in step {step}"
        if name not in wanted:
            return f"{name} is in step {step} but not wanted"
        if SOURCE.sub("", saved[name]) != SOURCE.sub("", wanted[name]):
            return f"{name} is {saved[name]} in step {step} but {wanted[name]} is wanted"
        return None

    differences = [line for line in map(compare, wanted | saved) if line]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise UserError(
            f"{'; '.join(differences[:5])}{more}; use the config that saved the run, or another run directory"
        )


def _none_whole(directory: Path, damaged: dict[int, str]) -> UserError:
    named = "; ".join(f"step {step}: {what}" for step, what in damaged.items())
    return UserError(f"no whole step in {directory}: {named}; restore the files, or delete them to start anew")


def _gather(iterator_state: dict[str, Any]) -> dict[str, Any]:
    """Return the iterator states of all processes as one: process 0's, with everyone's shards."""
    if jax.process_count() == 1:
        return iterator_state
    text = np.frombuffer(json.dumps(iterator_state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - text.size)))
    states = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    return states[0] | {"shards": {number: shard for state in states for number, shard in state["shards"].items()}}


def _restore_subtree(step_dir: Path, prefix: str) -> dict[str, Any]:
    """Return the leaves whose path begins with `prefix` as a nested dict of numpy arrays."""
    checkpointer = ocp.Checkpointer(_handler())
    run = checkpointer.restore(step_dir, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
    names = [name for name in run["leaves"] if name.startswith(prefix)]
    on_host = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    args = ocp.args.PyTreeRestore(dict.fromkeys(names, 0), restore_args=on_host, partial_restore=True)
    leaves = checkpointer.restore(step_dir, args=ocp.args.Composite(state=args))["state"] if names else {}
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.removeprefix(prefix).split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
