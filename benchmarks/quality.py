"""What a student is worth beside what it cost: supervised, distilled by kdjax, and distilled by TRL.

COMMAND: python -m benchmarks.quality                  (about 2 hours on 2 CPU cores; run again to go on)
         python -m benchmarks.quality --arms supervised "forward KL, T = 1" --seeds 2       (a part of it)

A teacher of bytes is trained first. All students then start from the same random weights and read the same rows in the
same order; a seed is that of both. Every row is one document, so that no engine has to keep documents apart. Each arm
is tried at the same three constant learning rates with the first seed, and trained with the other seeds at the one
that ends with the lowest held-out KL to the teacher. TRL is `GKDTrainer`, off-policy, forward KL at temperature 1, a
process of its own (benchmarks/engines); what its student is worth is measured as ours is. Rows, each with its curve, go
to benchmarks/results/quality.jsonl, of which docs/quality.svg is drawn.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness, peers
from kdjax.build import build
from kdjax.config import Config
from kdjax.console import count, percent
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
RATES = (3e-3, 1e-3, 1e-2)
FIGURES = ("kl", "perplexity", "agreement", "teacher_perplexity")
CURVE = ("step", "tokens", "seconds", *FIGURES)


class Scale(NamedTuple):
    """How long everything trains, and at how many of the rates."""

    teacher_steps: int = 1500
    steps: int = 400
    rates: int = len(RATES)


QUICK = Scale(4, 2, 1)


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
    """Return the curve of a run, by `CURVE`; its seconds are those of its steps alone, each the median's."""
    shutil.rmtree(home / "run", ignore_errors=True)
    train(config, home / "run")
    rows = read(home / "run" / METRICS)
    each = statistics.median(row["seconds"] for row in rows if "seconds" in row and row["step"] > 1)
    looks = (row for row in rows if "eval_kl" in row)
    return [point(row["step"], each, {name: row[f"eval_{name}"] for name in FIGURES}) for row in looks]


def of_engine(engine: str, python: str, config: Config) -> list[list[float]]:
    """Return the curve of another engine's student, which is given the rows that ours would read.

    Raises:
        NotRunning: the engine is not there, or ended.
    """
    job = build(config)
    frozen = job.frozen()
    trees = {"teacher": frozen["teacher"], "student": job.start().params["student"]}
    specs: Any = {"teacher": job.teacher, "student": job.student}
    sized = replace(config, **{name: ModelSpec(architecture=named.model.config) for name, named in specs.items()})
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        peers.write_problem(sized, home, np.stack(list(islice(rows_of(job), config.steps))), trees)
        running, looks, seconds = peers.Running(engine, python, home), {0: measured(job, frozen, home / "student")}, []
        try:
            for step in range(1, config.steps + 1):
                running.step()
                seconds.append(running.told[-1]["seconds"])
                if step % config.eval_every == 0:
                    running.save(home / str(step))
                    looks[step] = measured(job, frozen, home / str(step))
        finally:
            running.close()
    each = statistics.median(seconds[1:])
    return [point(step, each, figures) for step, figures in looks.items()]


def point(step: int, each: float, figures: dict[str, float]) -> list[float]:
    """Return a point of a curve, by `CURVE`, after steps of so many seconds each."""
    return [step, step * ROWS * LENGTH, step * each, *(figures[name] for name in FIGURES)]


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


def last(row: harness.Row, name: str) -> float:
    """Return a figure at the end of a row's curve."""
    return row["curve"][-1][CURVE.index(name)]


def at_seconds(row: harness.Row, seconds: float, name: str = "kl") -> float:
    """Return a figure after so many seconds of training, between two looks on the straight line between them."""
    curve = np.array(row["curve"])
    return float(np.interp(seconds, curve[:, CURVE.index("seconds")], curve[:, CURVE.index(name)]))


def best_rate(rows: Sequence[harness.Row], arm: str, rates: int = len(RATES)) -> float | None:
    """Return the learning rate at which an arm's first seed ends with the lowest KL; None before all are tried."""
    tried = {row["rate"]: last(row, "kl") for row in rows if row["arm"] == arm and row["seed"] == 0}
    return min(tried, key=lambda rate: tried[rate]) if len(tried) >= rates else None


def chosen(rows: Sequence[harness.Row]) -> dict[str, list[harness.Row]]:
    """Return of each arm that has tried all rates the rows at its best one, a seed each."""
    rates = {arm: best_rate(rows, arm) for arm in ARMS}
    return {
        arm: sorted((row for row in rows if row["arm"] == arm and row["rate"] == rate), key=lambda row: row["seed"])
        for arm, rate in rates.items()
        if rate is not None
    }


def markdown(rows: Sequence[harness.Row], interval: Callable[[Sequence[float]], tuple[float, float]]) -> str:
    """Return the table of benchmarks/README.md.

    Args:
        rows: all there are.
        interval: of the mean of some numbers, and half the width of its 95 % interval.
    """
    arms = chosen(rows)
    if not arms:
        return "Not measured yet: `python -m benchmarks.quality` writes the figures that stand here."
    budget = min(last(row, "seconds") for found in arms.values() for row in found)
    plain = {row["seed"]: last(row, "kl") for row in arms.get("supervised", [])}

    def said(numbers: Sequence[float], shown: Callable[[float], str]) -> str:
        mean, half = interval(numbers)
        return f"{shown(mean)} ± {shown(half)}" if len(numbers) > 1 else shown(mean)

    nats = "{:.4f}".format
    heads = ["trained by", "rate", "seeds", "KL to the teacher (nats)", "less than supervised, pair by pair"]
    heads += ["perplexity", "agreement", f"KL after {budget:.0f} s", "a step"]
    lines = [f"| {' | '.join(heads)} |", f"|:--|{'--:|' * (len(heads) - 1)}"]
    for arm, found in arms.items():
        less = [plain[row["seed"]] - last(row, "kl") for row in found if row["seed"] in plain]
        cells = [
            arm,
            format(found[0]["rate"], "g"),
            str(len(found)),
            said([last(row, "kl") for row in found], nats),
            "–" if arm == "supervised" or not less else said(less, nats),
            said([last(row, "perplexity") for row in found], "{:.3f}".format),
            said([last(row, "agreement") for row in found], percent),
            said([at_seconds(row, budget) for row in found], nats),
            f"{statistics.median(last(row, 'seconds') / last(row, 'step') for row in found):.3f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    row = next(iter(arms.values()))[-1]
    teacher = f"The teacher's own perplexity is {last(row, 'teacher_perplexity'):.3f}."
    return "\n".join(
        [
            *lines,
            "",
            "![Held-out KL beside tokens and seconds](../docs/quality.svg)",
            "",
            f"{count(last(row, 'tokens'))} tokens of training each; mean over seeds with its 95 % interval (Student's "
            f"t). {teacher} {harness.measured_on(row['environment'])}.",
        ]
    )


def picture(rows: Sequence[harness.Row]) -> Figure:
    """Return held-out KL beside tokens and beside seconds, a line an arm: the mean over its seeds."""
    figure, arms = Figure(figsize=(11, 4.6), layout="constrained"), chosen(rows)
    axes = figure.subplots(1, 2, sharey=True)
    for n, (arm, found) in enumerate(arms.items()):
        curve = np.mean([row["curve"] for row in found], axis=0)
        style = "--" if ARMS[arm].engine else "-" if arm == "supervised" or "forward" in arm else ":"
        for ax, name in zip(axes, ("tokens", "seconds"), strict=True):
            x, y = (curve[1:, CURVE.index(column)] for column in (name, "kl"))
            ax.plot(x, y, style, color=f"C{n}", lw=1.6, marker="o", ms=3, label=arm)
    axes[0].set(ylabel="held-out KL to the teacher, nats a token", xlabel="tokens of training", yscale="log")
    axes[1].set(xlabel="seconds of training", xscale="log")
    axes[1].legend(frameon=False, fontsize="small")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, which="both")
    return figure


def left(rows: Sequence[harness.Row], arms: Sequence[str], seeds: int, rates: int) -> Iterator[tuple[str, float, int]]:
    """Yield what is not measured yet: the rates of all arms with the first seed, then the other seeds at the best."""
    done = {(row["arm"], row["rate"], row["seed"]) for row in rows}
    tried = [(arm, rate, 0) for rate in RATES[:rates] for arm in arms if (arm, rate, 0) not in done]
    if tried:
        yield from tried
        return
    best = {arm: best_rate(rows, arm, rates) for arm in arms}
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
    config = base(options.home / ("quick" if options.quick else "whole"), scale)
    while case := next(left(rows, arms, seeds, scale.rates), None):
        arm, rate, seed = case
        taught = run_of(config, arm, rate, seed)
        engine = ARMS[arm].engine
        try:
            curve = of_engine(engine, options.python, taught) if engine else of_kdjax(taught, options.home)
        except peers.NotRunning as error:
            print(f"{arm}: does not run here ({error})", file=sys.stderr, flush=True)
            arms.remove(arm)
            continue
        told = {"arm": arm, "rate": rate, "seed": seed}
        rows.append({"what": "quality", **told, "curve": curve, "environment": environment})
        print(json.dumps(told | dict(zip(CURVE, curve[-1], strict=True))), flush=True)
        if options.quick:
            continue
        harness.append(options.results, rows[-1:])
        with matplotlib.rc_context({"svg.hashsalt": "kdjax"}):
            picture(rows).savefig(options.picture, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    harness.leave(main)
