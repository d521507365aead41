"""What a model knows of documents that were distilled into it: accuracy on invented towns, beside plain training.

COMMAND: python -m benchmarks.knowledge             (about 3 hours on 2 CPU cores; run again to go on)
         python -m benchmarks.knowledge --arms distilled --splits wording       (a part of it)

Questions are held out by wording (the fact was asked otherwise in training) or by fact (it was never asked). An answer
is right that has the wanted one in it. Rows go to benchmarks/results/knowledge.jsonl.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, quick
from benchmarks.prompt_distill import sampled_once
from kdjax import config as configs
from kdjax.answers import ANSWERS, PROGRESS, answered
from kdjax.build import build
from kdjax.config import Config
from kdjax.console import percent, small
from kdjax.data import DataConfig
from kdjax.data.chat import render
from kdjax.data.holdout import split_documents
from kdjax.data.invented import facts
from kdjax.data.sources import open_source
from kdjax.jobs import generate_texts
from kdjax.label import label
from kdjax.models import ModelSpec
from kdjax.recovery import recovery
from kdjax.sampling import AnswersConfig
from kdjax.teacher import LabelConfig
from kdjax.train import train

RESULTS = harness.RESULTS / "knowledge.jsonl"
RECIPE = harness.ROOT / "configs" / "knowledge.py"

KEPT = LabelConfig(kind="hidden", batches=27)
"""What the teacher says to three epochs, which later ones go through in other orders."""
SPLITS = {"wording": "id", "fact": "fact"}
"""How questions are held out -> the column whose values are held out together."""


def _gold(config: Config, home: Path) -> DataConfig:
    """Return the questions with the answers that the documents give."""
    rows = ({**row, "answer": f" {row['answer']}"} for row in facts())
    return replace(config.data, sources=(f"jsonl:{_written(home / 'gold.jsonl', rows)}",))


def _documents(home: Path) -> DataConfig:
    """Return the documents as plain text, of which nothing is held out."""
    texts = ({"text": text} for text in dict.fromkeys(row["document"] for row in facts()))
    return DataConfig(
        sources=(f"jsonl:{_written(home / 'documents.jsonl', texts)}",), sequence_length=128, eval_fraction=0.0
    )


def _written(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), "utf-8")
    return path


def _supervised(config: Config, data: DataConfig) -> Config:
    return replace(config, data=data, answers=AnswersConfig(), objective=replace(config.objective, alpha=1.0))


ARMS: dict[str, Callable[[Config, Path], Config]] = {
    "distilled": lambda config, home: config,
    "distilled, on gold answers": lambda config, home: replace(
        config, data=_gold(config, home), answers=AnswersConfig()
    ),
    "supervised on the teacher's answers": lambda config, home: replace(
        config, objective=replace(config.objective, alpha=1.0)
    ),
    "supervised on gold answers": lambda config, home: _supervised(config, _gold(config, home)),
    "supervised on the documents": lambda config, home: replace(
        _supervised(config, _documents(home)),
        teacher=None,
        student=replace(config.student, source=config.teacher.source if config.teacher else ""),
    ),
}
"""What is compared -> its config, made from the recipe's."""


def of_arm(config: Config, arm: str, split: str, rate: float, seed: int, home: Path, count: int) -> harness.Row:
    """Return the figures of one run, answers those to the first `count` questions.

    What the teacher says is kept once, as hidden states, since the same few questions are seen in many epochs.
    """
    data = replace(config.data, group_field=SPLITS[split], seed=seed)
    optim = replace(config.optim, learning_rate=rate)
    config = replace(config, data=data, optim=optim, seed=seed, eval_every=0)
    taught, run, cache = ARMS[arm](config, home), home / "run", home / "cache"
    for made in (run, cache):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    said = sampled_once(config, home / "answers")
    if taught.answers.by == "teacher":
        for name in (ANSWERS, PROGRESS):
            shutil.copy(said / name, run)
            shutil.copy(said / name, cache)
    if taught.objective.alpha != 1.0:
        label(replace(taught, label=replace(KEPT, batches=min(KEPT.batches, taught.steps))), cache)
        taught = replace(taught, cache=str(cache))
    summary = train(taught, run)
    job = build(replace(config, student=ModelSpec(source=str(run))), answered(config, said))
    summary |= recovery(job, job.start().params, job.frozen())
    figures = {name: summary.get(name) for name in ("steps", "train_tokens", "seconds", "recovered", "forgetting")}
    return figures | accuracies(config, run, count)


def accuracies(config: Config, run: Path, count: int) -> harness.Row:
    """Return the share of held-out and trained questions, of the first `count`, answered right, by way of answering."""
    teacher, held = config.teacher.source if config.teacher else "", _held_out(config)
    how = config.answers.tokens, config.answers.stop, count
    marks = {
        "before": _right_before(teacher, config.data.student_view, *how),
        "open book": _right_before(teacher, config.data.teacher_view, *how),
        "after": _right(str(run), config.data.student_view, *how),
    }
    return {
        way: {
            "held_out": _mean([mark for name, mark in right.items() if name in held]),
            "trained": _mean([mark for name, mark in right.items() if name not in held]),
        }
        for way, right in marks.items()
    }


def _held_out(config: Config) -> set[str]:
    """Return the ids of the questions that are held out, whichever way they are answered."""
    source = open_source(config.data.sources[0])
    return {source.record(int(row))["id"] for _, row in split_documents([source], config.data).held_out}


def _right(source: str, view: str, tokens: int, stop: tuple[str, ...], count: int) -> dict[str, bool]:
    """Return of each question, by its id, whether what a model answers behind a view has the wanted answer in it."""
    rows, said = facts()[:count], [""] * count
    prompts = [render(view, row, strict=True) for row in rows]
    for number, piece, _ in generate_texts(source, prompts, max_new_tokens=tokens, stop=stop):
        said[number] += piece
    return {row["id"]: row["answer"].lower() in text.lower() for row, text in zip(rows, said, strict=True)}


_right_before = cache(_right)
"""The same of the model that no run changes."""


def _mean(marks: Sequence[bool]) -> dict[str, Any]:
    """Return a share with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(np.array(marks, float), (2_000, len(marks))).mean(1)
    return {"accuracy": float(np.mean(marks)), "interval": np.percentile(drawn, (2.5, 97.5)).tolist()}


def _best(rows: Sequence[harness.Row]) -> list[harness.Row]:
    """Return of each split and arm, in their order, the run with the learning rate that has most right."""
    groups = {(split, arm): list[harness.Row]() for split in SPLITS for arm in ARMS}
    for row in rows:
        groups[row["split"], row["arm"]].append(row)
    return [max(group, key=lambda row: row["after"]["held_out"]["accuracy"]) for group in groups.values() if group]


COLUMNS = {
    "before": ("before", "held_out"),
    "after": ("after", "held_out"),
    "after, trained questions": ("after", "trained"),
    "open book": ("open book", "held_out"),
}
"""Head of a column -> what of a row stands in it."""


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/case-study.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.knowledge` writes the figures that stand here."
    heads = ["held out by", "taught", "rate", *COLUMNS, "forgetting (nats)"]
    lines = [f"| {' | '.join(heads)} |", f"|:--|:--|{'--:|' * (len(heads) - 2)}"]
    for row in _best(rows):
        cells = [row["split"], row["arm"], format(row["rate"], "g")]
        cells += [_cell(row[way][part]) for way, part in COLUMNS.values()]
        lines.append(f"| {' | '.join([*cells, small(row['forgetting']['kl']) if row['forgetting'] else '–'])} |")
    there = {(row["split"], row["arm"]) for row in rows}
    absent = [f"{arm} (by {split})" for split in SPLITS for arm in ARMS if (split, arm) not in there]
    short = f" Not measured yet: {'; '.join(absent)}." if absent else ""
    last, tried = rows[-1], ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in rows}))
    return "\n".join(
        [
            *lines,
            "",
            "Share of answers that have the wanted one in them, with its 95 % bootstrap interval over questions; "
            f"{last['steps']} steps each. Learning rates tried: {tried}; of several the one with most right on these "
            f"questions is shown, which flatters all arms alike.{short} {harness.measured_on(last['environment'])}.",
        ]
    )


def _cell(share: dict[str, Any]) -> str:
    low, high = map(percent, share["interval"])
    return f"{percent(share['accuracy'])} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=list(SPLITS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=Path("runs") / "knowledge", metavar="DIR")
    options = parser.parse_args(arguments)
    config, environment = configs.load(str(RECIPE)), harness.environment()
    done = {(row["arm"], row["split"], row["rate"], row["seed"]) for row in harness.kept(options)}
    cases = [
        (arm, split, rate, options.seed) for split in options.splits for rate in options.rates for arm in options.arms
    ]
    left = [case for case in cases if case not in done]
    progress = harness.Progress(len(left), None)
    with harness.home(options, options.home) as home:
        config, count = (quick.recipe(config, home), 24) if options.quick else (config, len(facts()))
        for arm, split, rate, seed in left:
            row = {"what": "knowledge", "arm": arm, "split": split, "rate": rate, "seed": seed}
            row |= of_arm(config, arm, split, rate, seed, home, count)
            harness.tell(options, row, environment)
            right = row["after"]["held_out"]["accuracy"]
            progress.advance(1, f"{arm}, held out by {split}, rate {rate:g}: {percent(right)} right")
    return 0


if __name__ == "__main__":
    harness.leave(main)
