"""The host loop: build, restore, step, log one step late, evaluate, save. It reads as a list of verbs."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from kdjax import config as configs
from kdjax import manifest, profile, summary
from kdjax.answers import ANSWERS, PROGRESS, answered
from kdjax.build import build
from kdjax.checkpoint import Checkpoints
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.evaluate import evaluate
from kdjax.fields import differences, to_json
from kdjax.job import Job
from kdjax.lock import lock_run
from kdjax.metrics import METRICS, Throughput, Writer, open_writers, read, write_json
from kdjax.models.adapter import BASE
from kdjax.on_policy import figures_of, take
from kdjax.plan.flops import Flops
from kdjax.shapes import Batch
from kdjax.step import TrainState
from kdjax.stopping import asked_to_stop
from kdjax.teachers import check_is_run
from kdjax.utilisation import flops_of, teachers_share, utilisation

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop, has saved itself, and can go on."""

    def __init__(self, run: Run, number: int) -> None:
        saved = f"step {run.saved} is saved" if run.saved else "nothing is saved yet"
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {run.step}, {saved}; "
            f"`kdjax train {run.directory}` goes on"
        )
        self.exit_code = 128 + number


@dataclass
class Run:
    """A run on its way: what changes while it trains.

    Attributes:
        step: batches consumed.
        saved: the newest saved step; 0 where there is none.
        data_state: where the data goes on.
        looks: step -> the figures of its evaluation.
        summary: of what is known already.
        skipped_in_a_row: latest updates left out because they were not finite, as far as they are logged.
        asked_to_stop: says which signal asked for it; 0 is none.
        since: when the step that is to be logged next began.
        began: when the run would have begun, had it run through.
        entered: when this process took it up.
        compiled: what was compiled since then; None once the first step has been logged.
        tracer: names the steps, and traces those that it was told to.
    """

    job: Job
    directory: Path
    checkpoints: Checkpoints
    state: TrainState
    began: float
    step: int = 0
    saved: int = 0
    data_state: dict[str, Any] | None = None
    frozen: dict[str, Any] = field(default_factory=dict)
    looks: dict[int, dict[str, float]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    pace: Throughput = field(default_factory=Throughput)
    skipped_in_a_row: float = 0
    asked_to_stop: Callable[[], int] = lambda: 0
    since: float = 0.0
    entered: float = 0.0
    compiled: dict[str, float] | None = None
    tracer: profile.Tracer = field(default_factory=lambda: profile.Tracer(Path(), None))

    @cached_property
    def flops(self) -> Flops:
        """FLOPs of a step."""
        return flops_of(self.job)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Send a row to every writer."""
        for writer in self.writers:
            writer.write(step, row)


def train(config: Config, directory: Path, traced: profile.Span | None = None) -> dict[str, Any]:
    """Train, or go on training, in a run directory; return the summary that is also written there.

    Args:
        config: the run's.
        directory: its own; made where it is not there.
        traced: steps to trace into the directory's `profile`.

    Raises:
        UserError: anything wrong with the config or the directory, a save that failed, numbers that stay not finite.
        Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    began = time.perf_counter()
    check_is_run(config)
    directory.mkdir(parents=True, exist_ok=True)
    with lock_run(directory), profile.compilations() as compiled:
        if jax.process_index() == 0:
            check_same_run(config, directory)
        job = build(config, answered(config, directory))
        with Checkpoints(directory / "checkpoints", config.checkpoint, job.frozen_names()) as checkpoints:
            run = _restore_or_start(job, directory, checkpoints, began)
            if run.step == config.steps and "steps" in run.summary:
                log.info("%s has done its %d steps already", directory, run.step)
                return run.summary
            run.frozen = job.frozen()
            run.entered, run.compiled, run.tracer = began, compiled, _tracer(run, traced)
            with _writing(run), closing(run.tracer):
                with asked_to_stop(lambda: run.step) as run.asked_to_stop:
                    _look(run)
                    if run.step == 0:
                        _open_summary(run)
                    _steps(run)
                _close_summary(run)  # all steps are saved: a signal may end it, and the run goes on here
    return run.summary


def check_same_run(config: Config, directory: Path) -> None:
    """Check that a directory is empty, or holds a run of the same config, or one that has saved no step yet.

    Raises:
        UserError: naming the fields that differ.
    """
    saved = directory / "config.json"
    if not saved.exists():
        strangers = sorted(p.name for p in directory.iterdir() if p.name not in (".lock", ANSWERS, PROGRESS))
        if strangers:
            raise UserError(f"{directory} holds {strangers[0]!r} but no run; choose another --run-dir, or empty it")
        return
    if not manifest.step_numbers(directory / "checkpoints"):
        return  # nothing can be lost, so it starts anew, as the config may have been wrong
    different = differences(configs.load(str(saved)), config)
    if different:
        raise UserError(
            f"{directory} holds a run whose config differs ({'; '.join(different[:5])}); go on with "
            f"`kdjax train {directory}`, choose another --run-dir, or delete that run"
        )


def _restore_or_start(job: Job, directory: Path, checkpoints: Checkpoints, began: float) -> Run:
    """Return the run at its newest saved step, or before its first one; its files are there either way."""
    saved = checkpoints.restore(job.abstract_state)
    if jax.process_index() == 0:
        write_json(directory / "config.json", asdict(job.config))
        write_json(directory / "model.json", asdict(job.student.model.config))
        (directory / BASE).unlink(missing_ok=True)  # of a run that saved nothing, and was of another config
        if (base := job.student.base_record()) is not None:
            write_json(directory / BASE, base)
        job.tokenizer.save(directory)
    if saved is None:
        return Run(job, directory, checkpoints, job.start(), began)
    if saved.step < job.config.steps:
        log.info("%s goes on after step %d", directory, saved.step)
    run = Run(job, directory, checkpoints, saved.state, began, saved.step, saved.step, saved.iterator_state)
    run.summary = _read_summary(directory / "summary.json")
    return run


def _read_summary(path: Path) -> dict[str, Any]:
    """Return what a summary says; nothing where there is none or it is damaged, since it can be written anew."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        log.warning("%s is damaged (%s); it is written anew", path, error)
        return {}


@contextmanager
def _writing(run: Run) -> Iterator[None]:
    """Open the writers, cut back to the restored step, and take up what was measured until there."""
    config, is_first = run.job.config, jax.process_index() == 0
    run.writers = open_writers(run.directory, config.steps, run.pace.eta, start=run.step, enabled=is_first)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("metrics are cut back")
    for row in read(run.directory / METRICS):
        run.began -= row.get("seconds", row.get("eval_seconds", 0.0))
        figures = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
        if figures:
            run.looks[row["step"]] = figures
    run.summary.pop("steps", None)  # without it a summary is of a run on its way
    _write_summary(run)
    try:
        yield
    finally:
        for writer in run.writers:
            writer.close()


def _steps(run: Run) -> None:
    """Train to the last step. Metrics are read one step late, so that the device never waits for the host."""
    config, late = run.job.config, None
    batches = run.job.data.train(run.data_state)
    _stop_if_asked(run)
    _ = run.job.learning_rates  # known before the first step: computed beside steps, it would wait for the next one
    run.since = time.perf_counter()
    while run.step < config.steps:
        turn = take(run.job, batches, run.state, run.frozen, run.step, run.data_state)
        run.data_state = turn.after
        with run.tracer.step(run.step + 1, run.state):
            given = run.job.given(run.frozen, turn.batch, trains=True)
            run.state, metrics = run.job.step(run.state, *given)
        run.step += 1
        if run.tracer.is_last(run.step):
            with run.pace.paused():
                _tell_of_trace(run, given)
        run.checkpoints.check()
        if late:
            _log(run, *late)
        late = run.step, metrics | figures_of(run.job, turn)
        saves = run.step % config.checkpoint.every == 0 or run.step == config.steps
        if saves or _is_look_due(run) or run.asked_to_stop():
            _log(run, *late)
            late = None
            _save(run)
            _stop_if_asked(run)
            _look(run)
            run.since = time.perf_counter()
    run.checkpoints.wait()


def _log(run: Run, step: int, metrics: dict[str, Any]) -> None:
    """Write a step's row."""
    config, now = run.job.config, time.perf_counter()
    row = {name: float(value) for name, value in jax.device_get(metrics).items()}
    updates = step - 1 - row["skipped"] + (row["skipped_in_a_row"] > 0)
    row |= {
        "learning_rate": float(run.job.learning_rates[int(updates)]),
        "tokens_per_second": run.pace.tick(config.batch_size * config.data.sequence_length),
        "seconds": now - run.since,
    }
    row |= utilisation(run.job, run.flops, row["tokens_per_second"])
    row |= _of_first_step(run, now)
    run.write(step, row)
    _name_not_finite(step, row)
    run.since, run.skipped_in_a_row = now, row["skipped_in_a_row"]
    if run.skipped_in_a_row >= config.abort_after:
        raise UserError(
            f"loss or gradient was not finite {config.abort_after} times in a row, up to step {step}; "
            f"step {run.saved} is the newest saved; lower optim.learning_rate, or look at the data of these steps"
        )


def _of_first_step(run: Run, now: float) -> dict[str, float]:
    """Return, once, how long the first step of this process has taken to come, and how much of it was compiling."""
    if run.compiled is None:
        return {}
    compiled, run.compiled = run.compiled, None
    found = {"first_step_seconds": now - run.entered, "teachers_flops": teachers_share(run.flops)}
    found |= {f"compiled_{name}": value for name, value in compiled.items()}
    run.summary |= found | {"flops": asdict(run.flops)}
    _write_summary(run)
    return found


def _tracer(run: Run, traced: profile.Span | None) -> profile.Tracer:
    """Return what traces a run's steps; process 0 does.

    Raises:
        UserError: the run does not come to these steps any more.
    """
    if traced is not None and not run.step < traced.last <= run.job.config.steps:
        raise UserError(
            f"--profile.steps ends with step {traced.last}, but {run.directory} goes from step {run.step + 1} to "
            f"{run.job.config.steps}; name steps between them"
        )
    return profile.Tracer(run.directory / "profile", traced if jax.process_index() == 0 else None)


def _tell_of_trace(run: Run, given: tuple[Any, Batch]) -> None:
    """End the trace, and say what takes the time in it."""
    jax.block_until_ready(run.state)
    trace = run.tracer.stop()
    lowered = run.job.lowered(run.state, run.frozen, given[1])
    shares = profile.shares(trace, *(each.compile().as_text() for each in lowered))
    run.summary["profile"] = shares
    said = ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) or "no operation of the step was found"
    log.info("%s holds the trace, up to step %d; of the devices' time: %s", run.directory / "profile", run.step, said)
    _write_summary(run)


def _name_not_finite(step: int, row: dict[str, float]) -> None:
    """Stop where objective.debug has found numbers that are not finite, and say in what."""
    found = {name.removeprefix("not_finite_"): n for name, n in row.items() if name.startswith("not_finite_") and n}
    if found:
        where = ", ".join(f"{name} ({n:.0f} numbers)" for name, n in found.items())
        raise UserError(
            f"step {step}: not finite: {where}; look at the weights and learning rate of that model, "
            "or set objective.debug to False to skip such updates"
        )


def _is_look_due(run: Run) -> bool:
    config = run.job.config
    at = run.step in (0, config.steps) or (config.eval_every and run.step % config.eval_every == 0)
    return bool(at and run.job.data.held_out)


def _look(run: Run) -> None:
    """Evaluate where it is due and was not done before, and give the saved step its figure."""
    if not _is_look_due(run):
        return
    if run.step not in run.looks:
        with run.pace.paused():
            figures = evaluate(lambda given: run.job.sums(run.state.params, *given), _held_out(run))
        run.write(run.step, {f"eval_{name}": value for name, value in figures.items()})
        run.looks[run.step] = figures
    _save(run)


def _held_out(run: Run) -> Iterator[tuple[Any, Batch]]:
    for batch in run.job.data.evaluation(run.job.config.batch_size):
        _stop_if_asked(run)
        yield run.job.given(run.frozen, batch)


def _save(run: Run) -> None:
    """Save the step, or give the one saved last its figure.

    While updates are being left out nothing is saved, so that what broke the numbers never crowds out a good step.
    """
    config = run.job.config
    if run.step == 0 or (run.skipped_in_a_row and run.step < config.steps):
        return
    look = run.looks.get(run.step, {})
    run.checkpoints.save(
        run.step,
        run.state,
        run.data_state or {},
        to_json(config),
        look.get("kl", look.get("ce", look.get("features"))),
    )
    run.saved = run.step


def _stop_if_asked(run: Run) -> None:
    number = run.asked_to_stop()
    if number:
        _save(run)
        run.checkpoints.wait()
        raise Stopped(run, number)


def _open_summary(run: Run) -> None:
    run.summary = summary.opening(run.job, run.state.params, run.frozen, run.looks)
    run.summary |= summary.quantizing(run.job, run.frozen)
    if "kl_quantized" in run.summary:
        log.info(summary.QUANTIZED.format(**run.summary))
    _write_summary(run)


def _close_summary(run: Run) -> None:
    """Write what the run has come to; what was known before training stays."""
    rows, seconds = read(run.directory / METRICS), time.perf_counter() - run.began
    closing = summary.closing(run.job, run.state, run.frozen, run.looks, rows)
    said = run.summary.get("continuations", {}) | closing["continuations"]
    run.summary |= closing | {"continuations": said, "seconds": seconds}
    _write_summary(run)


def _write_summary(run: Run) -> None:
    if jax.process_index() == 0:
        write_json(run.directory / "summary.json", run.summary)
