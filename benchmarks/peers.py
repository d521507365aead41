"""The whole distillation step of kdjax beside what users would pick instead: Tunix, TRL, Liger-Kernel, plain PyTorch.

COMMAND: python -m benchmarks.peers                                   (10 minutes on 2 CPU cores)
         python -m benchmarks.peers --teacher.dtype bfloat16 --student.dtype bfloat16
         python -m benchmarks.peers --python Tunix=DIR/bin/python --engines kdjax Tunix

All have the same weights, batch, loss and optimiser (benchmarks/engines says which), and all cores. Each is a process
of its own, and they take their steps in turn. The first step's loss and norm of the gradient are compared with ours; an
engine that is further off than 1e-3 is marked as not doing the same job. Sizes are flags, as of `benchmarks.step`. What
they need:

    pip install -e ".[peers]" && pip install --no-deps liger-kernel==0.8.5
    python -m venv DIR && DIR/bin/pip install google-tunix==0.1.7 "jax==0.10.2"     (does not go with the others)

An engine that is not there is a printed line. Rows go to benchmarks/results/peers.jsonl; `python -m benchmarks.readme`
puts them into benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import harness, step
from benchmarks.prompts import said
from kdjax import config as configs
from kdjax.config import Config
from kdjax.console import amount
from kdjax.errors import UserError
from kdjax.models import Model, export
from kdjax.models.config import Rope
from kdjax.plan.abstract import abstract_job
from kdjax.utilisation import flops_of

RESULTS = harness.RESULTS / "peers.jsonl"
SAME = 1e-3
"""How far, of itself, another's first loss and norm of the gradient may be from ours."""
WARM = 3
"""Steps that are not timed."""
SIZES = "layers 2", "width 64", "heads 2", "kv-heads 1", "head-width 32", "mlp-width 128", "vocab-size 512"
QUICK = [
    *("--batch-size", "2", "--data.sequence-length", "64"),
    *(part for who in ("teacher", "student") for size in SIZES for part in f"--{who}.architecture.{size}".split()),
]


class Engine(NamedTuple):
    """A row of `ENGINES`.

    Attributes:
        command: a module of benchmarks.engines, and what it is given.
        kinds: of devices, by jax's name, that it runs on.
    """

    command: tuple[str, ...]
    kinds: tuple[str, ...] = ("cpu", "gpu")


ENGINES: dict[str, Engine] = {
    "kdjax": Engine(("ours",)),
    "Tunix": Engine(("tunix",)),
    "torch plain": Engine(("torch_loop",)),
    "TRL GKDTrainer": Engine(("trl_gkd",)),
    "TRL's chunked loss": Engine(("torch_loop", "TRL chunked")),
    "Liger eager": Engine(("torch_loop", "Liger eager"), ("cpu",)),
    "Liger Triton": Engine(("torch_loop", "Liger Triton"), ("gpu",)),
}
"""Name -> how it is started. To add one: a module that opens a `Gate`, and a row."""


class NotRunning(RuntimeError):
    """An engine that has ended, with the last line it said."""


class Running:
    """An engine's process, which waits until it is asked for a step.

    Attributes:
        told: what it told of each step, the versions first.
    """

    def __init__(self, name: str, python: str, home: Path) -> None:
        """Start it, and wait until it is ready.

        Raises:
            NotRunning: it ended.
        """
        module, *more = ENGINES[name].command
        self.log = home / f"{name}.log"
        environment = os.environ | {
            "PYTHONPATH": str(harness.ROOT),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("w") as log:
            self.process: Any = subprocess.Popen(
                [python, "-m", f"benchmarks.engines.{module}", str(home), *more],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=harness.ROOT,
                env=environment,
            )
        self.told = [self._read()]

    def step(self) -> None:
        """Let it take one step, and wait for it.

        Raises:
            NotRunning: it ended.
        """
        self.told.append(self._ask("step"))

    def save(self, directory: Path) -> None:
        """Let it write its student into a directory.

        Raises:
            NotRunning: it ended.
        """
        self._ask(f"save {directory}")

    def _ask(self, what: str) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            raise NotRunning(*last)
        return json.loads(line)

    def first(self, name: str) -> float:
        """Return a figure of its first step, which some tell of only later."""
        return next(facts[name] for facts in self.told if name in facts)

    def close(self) -> None:
        """End it."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def shape() -> Config:
    """Return the default, that of `benchmarks.step` with the only base of rotary angles that Tunix's Llama has."""
    config, rope = step.shape(), Rope(theta=1e6)

    def of(spec: Any) -> Any:
        return replace(spec, architecture=replace(spec.architecture, rope=rope))

    return replace(config, teacher=of(config.teacher), student=of(config.student))


def write_problem(config: Config, home: Path, batches_NBT: np.ndarray, params: Mapping[str, Any]) -> None:
    """Write what every engine is given: teacher and student, and the tokens of the batches."""
    for name, spec in _specs(config).items():
        export(spec.architecture, params[name], home / name, None)
    np.save(home / "tokens.npy", batches_NBT)
    told = {"dtype": config.student.dtype, "learning_rate": config.optim.learning_rate, "b2": config.optim.b2}
    (home / "problem.json").write_text(json.dumps(told), "utf-8")


def _specs(config: Config) -> dict[str, Any]:
    return {"teacher": config.teacher, "student": config.student}


def started(names: Sequence[str], pythons: Mapping[str, str], home: Path) -> dict[str, Running]:
    """Return the engines that run here, warm; of the others one line each is printed."""
    found = {}
    for name in names:
        try:
            found[name] = engine = Running(name, pythons.get(name, sys.executable), home)
            for _ in range(WARM):
                engine.step()
        except NotRunning as error:
            print(f"{name}: does not run here ({error})", file=sys.stderr, flush=True)
            found.pop(name, None)
    return found


def measure(config: Config, names: Sequence[str], pythons: Mapping[str, str], rounds: int) -> list[harness.Row]:
    """Return a row of each engine that runs here.

    Raises:
        UserError: none does, or an engine ended between its steps.
    """
    flops = flops_of(abstract_job(config, jax.devices()))
    product, operations = step.product(config.student.dtype)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        specs = enumerate(_specs(config).items())
        params = {name: jax.jit(Model(spec.architecture).init)(jax.random.key(n)) for n, (name, spec) in specs}
        write_problem(config, home, step.random_batch(config, 1).student.tokens_BT[None], params)
        engines = started(names, pythons, home)
        if not engines:
            raise UserError(f"none of {', '.join(names)} runs here")
        try:
            runs: dict[str, Callable[[], Any]] = {name: engine.step for name, engine in engines.items()}
            variants = [
                harness.Variant(name, run, rounds, 1.0, meter=harness.unmetered)
                for name, run in (runs | {"product": product}).items()
            ]
            trials = harness.interleave(variants, least=rounds, on_trial=said)
            after = {name: harness.peak_of(engine.process.pid) for name, engine in engines.items()}
        except NotRunning as error:
            raise UserError(f"an engine ended between its steps: {error}") from error
        finally:
            for engine in engines.values():
                engine.close()
    rate = operations / statistics.median(trial.seconds for trial in trials["product"].values())
    ours = engines.get("kdjax")
    return [
        row(config, name, engine, ours, trials)
        | {
            "ratio": harness.ratio(trials[name], trials["kdjax"]) if ours else None,
            "floor_seconds": flops.useful / rate,
            "matmul_flops_per_second": rate,
            "peak_bytes": after[name],
        }
        for name, engine in engines.items()
    ]


def row(config: Config, name: str, engine: Running, ours: Running | None, trials: harness.Trials) -> harness.Row:
    """Return what is said of an engine's steps."""
    seconds = [trial.seconds for trial in trials[name].values()]
    median = statistics.median(seconds)
    rows, length = config.batch_size, config.data.sequence_length
    first = {what: engine.first(what) for what in ("loss", "grad_norm")}
    errors = {f"{what}_error": abs(first[what] / ours.first(what) - 1) for what in first} if ours else {}
    return {
        "engine": name,
        "versions": engine.told[0]["versions"],
        "tokens_per_second": rows * length / median,
        "weighted_tokens_per_second": rows * (length - 1) / median,
        "step_seconds": median,
        "step_seconds_quartiles": harness.quartiles(seconds),
        "rounds": len(seconds),
        **first,
        **errors,
        "same_job": all(error <= SAME for error in errors.values()) if errors else None,
        "device_bytes": engine.told[-1].get("device_bytes"),
        "dtype": config.student.dtype,
        "batch_size": rows,
        "sequence_length": length,
        **{name: step.sizes(spec.architecture) for name, spec in _specs(config).items()},
    }


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the tables of benchmarks/README.md: the newest of each engine, by what all had to do and on what."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.peers` writes the figures that stand here."
    jobs: dict[tuple[Any, ...], list[harness.Row]] = {}
    for row in rows:
        job = tuple(row[name] for name in ("dtype", "batch_size", "sequence_length", "teacher", "student"))
        jobs.setdefault((*job, harness.machine(row["environment"])), []).append(row)
    return "\n\n".join(_table(job, {row["engine"]: row for row in found}) for job, found in jobs.items())


def _table(job: tuple[Any, ...], rows: Mapping[str, harness.Row]) -> str:
    names = "engine", "tokens/s (quartiles)", "those with weight", "kdjax is faster", "times the floor"
    names += ("memory at most", "the same job: loss, gradient off by")
    lines = [f"| {' | '.join(names)} |", f"|:--|{'--:|' * (len(names) - 1)}"]
    ordered = sorted(rows.values(), key=lambda row: row["step_seconds"])
    for row in ordered:
        tokens = row["batch_size"] * row["sequence_length"]
        low, high = (amount(tokens / seconds) for seconds in reversed(row["step_seconds_quartiles"]))
        held = row["device_bytes"] or row["peak_bytes"]
        cells = (
            f"{row['engine']} ({', '.join(f'{name} {number}' for name, number in row['versions'].items())})",
            f"{amount(row['tokens_per_second'])} ({low} to {high})",
            amount(row["weighted_tokens_per_second"]),
            "–" if row["ratio"] is None or row["engine"] == "kdjax" else f"{row['ratio']:.2f} ×",
            f"{row['step_seconds'] / row['floor_seconds']:.2f} ×",
            "–" if held is None else f"{held / 1e9:.2f} GB",
            _same(row),
        )
        lines.append(f"| {' | '.join(cells)} |")
    dtype, batch, length, teacher, student, _ = job
    last = ordered[-1]
    return "\n".join(
        [
            f"{dtype}, {batch} × {length}; teacher {teacher}; student {student}:",
            "",
            *lines,
            "",
            f"The floor is the models' own FLOPs at the rate of a plain product, {last['floor_seconds']:.3g} s. "
            f"{last['rounds']} rounds. {harness.measured_on(last['environment'])}.",
        ]
    )


def _same(row: harness.Row) -> str:
    if row["same_job"] is None or row["engine"] == "kdjax":
        return "–"
    off = f"{row['loss_error']:.0e}, {row['grad_norm_error']:.0e}"
    return off if row["same_job"] else f"not the same job: {off}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the flags ask for; return the exit code."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = harness.parser(__doc__, RESULTS, "tiny models and 3 rounds; nothing is kept")
    here = [name for name, engine in ENGINES.items() if jax.default_backend() in engine.kinds]
    parser.add_argument("--engines", nargs="+", default=here, choices=here, metavar="ENGINE", help=", ".join(here))
    parser.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PATH", help="an engine's own interpreter")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each that are timed")
    options, flags = parser.parse_known_args(arguments)
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; wanted at least 1")
    pythons = dict(pair.partition("=")[::2] for pair in options.python)
    if unknown := [name for name, path in pythons.items() if name not in ENGINES or not Path(path).is_file()]:
        raise UserError(f"--python {unknown[0]}={pythons[unknown[0]]}: wanted ENGINE=PATH, of a file that is there")
    config = configs.override(shape(), [*(QUICK if options.quick else ()), *flags], "benchmarks.peers")
    environment = harness.environment()
    rows = measure(config, options.engines, pythons, 3 if options.quick else options.rounds)
    rows = [{"what": "peers"} | one | {"environment": environment} for one in rows]
    if not options.quick:
        harness.append(options.results, rows)
    print(markdown(rows), file=sys.stderr)
    print(
        json.dumps(
            {one["engine"]: {"tokens_per_second": one["tokens_per_second"], "ratio": one["ratio"]} for one in rows}
        )
    )
    return 0


if __name__ == "__main__":
    harness.leave(main)
