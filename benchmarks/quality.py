"""What a student is worth beside what it cost: supervised, distilled by kdjax, and distilled by TRL.

COMMAND: python -m benchmarks.quality                  (about 3 hours on 2 CPU cores; run again to go on)
         python -m benchmarks.quality --arms supervised "forward KL, T = 1" --seeds 2       (a part of it)

A teacher of bytes is trained first. All students then start from the same random weights and read the same rows in the
same order; a seed is that of both. Every row is one document, so that no engine has to keep documents apart. Each arm
is tried at the same constant learning rates with the first seed, and trained with the other seeds at the one
that ends with the lowest held-out KL to the teacher. TRL is `GKDTrainer`, off-policy, forward KL at temperature 1, a
process of its own (benchmarks/engines); what its student is worth is measured as ours is. At last all arms take steps
in turn: the median's seconds, times a student's steps, are how long it has trained. Rows, each with its curve, go to
benchmarks/results/quality.jsonl, of which docs/quality.svg is drawn.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np

from benchmarks import harness, peers, quality_table
from benchmarks.prompts import said
from benchmarks.quality_table import FIGURES, best_rate, curves, picture
from benchmarks.step import Training
from kdjax.build import build
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.data.python_docs import documents
from kdjax.data.tokenizers import load_tokenizer
from kdjax.evaluate import evaluate
from kdjax.job import Job
from kdjax.losses import ObjectiveConfig
from kdjax.metrics import METRICS, read
from kdjax.models import ModelConfig, ModelSpec, open_model
from kdjax.optim import OptimConfig
from kdjax.train import train

RESULTS = harness.RESULTS / "quality.jsonl"
PICTURE = harness.ROOT / "docs" / "quality.svg"
TEACHER = ModelConfig(vocab_size=264, width=192, layers=4, heads=6, kv_heads=2, head_width=32, mlp_width=512)
STUDENT = ModelConfig(vocab_size=264, width=96, layers=2, heads=3, kv_heads=1, head_width=32, mlp_width=256)
LENGTH, ROWS, LOOKS = 256, 8, 8
RATES = (3e-3, 1e-3, 1e-2, 3e-4)


class Scale(NamedTuple):
    """How long everything trains, at how many of the rates, and in how many rounds steps are timed."""

    teacher_steps: int = 1500
    steps: int = 400
    rates: int = len(RATES)
    rounds: int = 40


QUICK = Scale(4, 2, 1, 2)


class Arm(NamedTuple):
    """A way to train a student.

    Attributes:
        objective: kdjax's; another engine's own is forward KL.
        engine: a row of `benchmarks.peers.ENGINES`; empty is kdjax's own loop.
    """

    objective: ObjectiveConfig
    engine: str = ""


def _of(divergence: Any, temperature: float) -> Arm:
    return Arm(ObjectiveConfig(alpha=0.0, divergence=divergence, temperature=temperature))


ARMS: dict[str, Arm] = {
    "supervised": Arm(ObjectiveConfig(alpha=1.0)),
    **{f"forward KL, T = {t}": _of("forward_kl", float(t)) for t in (1, 2, 4)},
    **{f"reverse KL, T = {t}": _of("reverse_kl", float(t)) for t in (1, 2, 4)},
    "TRL, forward KL, T = 1": Arm(ObjectiveConfig(alpha=0.0, temperature=1.0), "TRL GKDTrainer"),
}
"""Name -> how a student is trained."""


def write_rows(path: Path) -> None:
    """Write the data: pieces of the documentation that are a row long each, with the module that each is of."""
    tokenizer = load_tokenizer("bytes")
    with path.open("w", encoding="utf-8") as file:
        for row in documents():
            text = row["text"].encode("ascii", "ignore").decode()
            for start in range(0, len(text) - LENGTH + 2, LENGTH - 1):
                piece = text[start : start + LENGTH - 1]
                if len(tokenizer.encode(piece)) == LENGTH - 1:  # and the token that ends it
                    file.write(f"{json.dumps({'text': piece, 'module': row['id'].partition('.')[0]})}\n")


def base(home: Path, scale: Scale) -> Config:
    """Return what all arms have in common; the data and the teacher are made where they are not there yet."""
    rows = home / "rows.jsonl"
    home.mkdir(parents=True, exist_ok=True)
    if not rows.exists():
        write_rows(rows)
    config = Config(
        name="quality",
        student=ModelSpec(architecture=STUDENT),
        data=DataConfig(
            sources=(f"jsonl:{rows}",),
            tokenizer="bytes",
            sequence_length=LENGTH,
            packing="first_fit",
            group_field="module",
            eval_tokens=32_768,
        ),
        steps=scale.steps,
        batch_size=ROWS,
        eval_every=max(1, scale.steps // LOOKS),
    )
    taught = replace(
        config,
        student=ModelSpec(architecture=TEACHER),
        objective=ObjectiveConfig(alpha=1.0),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=scale.teacher_steps // 30),
        steps=scale.teacher_steps,
        eval_every=0,
    )
    train(taught, home / "teacher")
    return replace(config, teacher=ModelSpec(source=str(home / "teacher")))


def run_of(config: Config, name: str, rate: float, seed: int) -> Config:
    """Return an arm's config."""
    optim = OptimConfig(learning_rate=rate, schedule="constant", clip_norm=0.0)
    data = replace(config.data, seed=seed)
    return replace(config, objective=ARMS[name].objective, optim=optim, data=data, seed=seed)


def of_kdjax(config: Config, home: Path) -> list[list[float]]:
    """Return the curve of a run, by `CURVE`."""
    shutil.rmtree(home / "run", ignore_errors=True)
    train(config, home / "run")
    looks = (row for row in read(home / "run" / METRICS) if "eval_kl" in row)
    return [point(row["step"], {name: row[f"eval_{name}"] for name in FIGURES}) for row in looks]


def of_engine(engine: str, python: str, config: Config) -> list[list[float]]:
    """Return the curve of another engine's student, which is given the rows that ours would read.

    Raises:
        NotRunning: the engine is not there, or ended.
    """
    job = build(config)
    frozen = job.frozen()
    with engine_of(engine, python, job, frozen, config.steps) as (running, home):
        looks = {0: measured(job, frozen, home / "student")}
        for step in range(1, config.steps + 1):
            running.step()
            if step % config.eval_every == 0:
                running.save(home / str(step))
                looks[step] = measured(job, frozen, home / str(step))
    return [point(step, figures) for step, figures in looks.items()]


@contextmanager
def engine_of(engine: str, python: str, job: Job, frozen: Any, steps: int) -> Iterator[tuple[peers.Running, Path]]:
    """Give another engine, begun on a job's weights and the rows of so many steps, and the directory it works in.

    Raises:
        NotRunning: the engine is not there, or ended.
    """
    trees = {"teacher": frozen["teacher"], "student": job.start().params["student"]}
    specs: Any = {"teacher": job.teacher, "student": job.student}
    sized = replace(job.config, **{name: ModelSpec(architecture=of.model.config) for name, of in specs.items()})
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        peers.write_problem(sized, home, np.stack(list(islice(rows_of(job), steps))), trees)
        running = peers.Running(engine, python, home)
        try:
            yield running, home
        finally:
            running.close()


def paces(config: Config, arms: Sequence[str], python: str, rounds: int) -> list[harness.Row]:
    """Return a row of each arm with the seconds of its step; all take their steps in turn.

    Raises:
        NotRunning: another engine is not there, or ended.
    """
    with ExitStack() as stack:
        steps: dict[str, Callable[[], Any]] = {}
        for name in arms:
            job = build(run_of(config, name, RATES[0], 0))
            frozen, engine = job.frozen(), ARMS[name].engine
            if engine:
                steps[name] = stack.enter_context(engine_of(engine, python, job, frozen, 1))[0].step
            else:
                batch, _ = next(job.data.train(prefetch=0))
                steps[name] = Training(job, frozen, batch, job.start()).step
            for _ in range(peers.WARM):
                steps[name]()
        variants = [harness.Variant(name, step, rounds, 1.0, meter=harness.unmetered) for name, step in steps.items()]
        trials = harness.interleave(variants, least=rounds, on_trial=said)
    return [{"what": "pace", "arm": name} | harness.summary(found) for name, found in trials.items()]


def point(step: int, figures: dict[str, float]) -> list[float]:
    """Return a point of a curve, by `CURVE`."""
    return [step, step * ROWS * LENGTH, *(figures[name] for name in FIGURES)]


def rows_of(job: Job) -> Iterator[np.ndarray]:
    """Yield the tokens of each batch of training.

    Raises:
        RuntimeError: a row is not one document, so that another engine would see it otherwise.
    """
    for batch, _ in job.data.train(prefetch=0):
        if not np.all(np.asarray(batch.student.segment_BT) == 1):
            raise RuntimeError("a row of the data is not one document of its whole length")
        yield np.asarray(batch.student.tokens_BT)


def measured(job: Job, frozen: Any, directory: Path) -> dict[str, float]:
    """Return the held-out figures of a student in a directory, beside the job's frozen trees."""
    tensors = open_model(str(directory)).tensors
    params = {"student": jax.tree.map(lambda tensor: tensor.all(), tensors), "projections": {}}
    given = (job.given(frozen, batch) for batch in job.data.evaluation(job.config.batch_size))
    return evaluate(lambda batch: job.sums(params, *batch), given)


def left(rows: Sequence[harness.Row], arms: Sequence[str], seeds: int, rates: int) -> Iterator[tuple[str, float, int]]:
    """Yield what is not measured yet: the rates of all arms with the first seed, then the other seeds at the best."""
    done = {(row["arm"], row["rate"], row["seed"]) for row in curves(rows)}
    tried = [(arm, rate, 0) for rate in RATES[:rates] for arm in arms if (arm, rate, 0) not in done]
    if tried:
        yield from tried
        return
    best = {arm: best_rate(rows, arm) for arm in arms}
    cases = ((arm, rate, seed) for seed in range(1, seeds) for arm, rate in best.items() if rate is not None)
    yield from (case for case in cases if case not in done)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet."""
    parser = harness.parser(__doc__, RESULTS, "a few steps, one rate and seed; nothing is kept")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter that TRL is in")
    parser.add_argument("--home", type=Path, default=Path("runs") / "quality", metavar="DIR")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PATH")
    options = parser.parse_args(arguments)
    scale, seeds = (QUICK, 1) if options.quick else (Scale(), options.seeds)
    environment, arms = harness.environment(), list(options.arms)
    rows = harness.kept(options)

    def tell(row: harness.Row) -> None:
        rows.append(harness.tell(options, row, environment))
        if not options.quick:
            with matplotlib.rc_context({"svg.hashsalt": "kdjax"}):
                picture(rows).savefig(options.picture, metadata={"Date": None})

    config = base(options.home / ("quick" if options.quick else "whole"), scale)
    while case := next(left(rows, arms, seeds, scale.rates), None):
        arm, rate, seed = case
        taught, engine = run_of(config, arm, rate, seed), ARMS[arm].engine
        try:
            curve = of_engine(engine, options.python, taught) if engine else of_kdjax(taught, options.home)
        except peers.NotRunning as error:
            print(f"{arm}: does not run here ({error})", file=sys.stderr, flush=True)
            arms.remove(arm)
            continue
        tell({"what": "quality", "arm": arm, "rate": rate, "seed": seed, "curve": curve})
    trained = list(dict.fromkeys(row["arm"] for row in curves(rows)))
    if {*trained} - quality_table.paces(rows).keys():
        try:
            for row in paces(config, trained, options.python, scale.rounds):
                tell(row)
        except peers.NotRunning as error:
            print(f"no steps are timed: an engine does not run here ({error})", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    harness.leave(main)
