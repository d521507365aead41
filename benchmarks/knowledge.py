"""What a model knows of documents that were distilled into it: accuracy on invented towns, beside plain training.

COMMAND: python -m benchmarks.knowledge             (about 50 minutes on 2 CPU cores; run again to go on)
         python -m benchmarks.knowledge --arms distilled --splits wording       (a part of it)

Questions are held out by wording (the fact was asked otherwise in training) or by fact (it was never asked). An answer
is right that has the wanted one in it. Rows go to benchmarks/results/knowledge.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from kdjax import config as configs
from kdjax.answers import ANSWERS, PROGRESS, write_answers
from kdjax.build import build
from kdjax.config import Config
from kdjax.console import percent, small
from kdjax.data import DataConfig, questions
from kdjax.data.holdout import split_documents
from kdjax.data.invented import facts
from kdjax.data.sources import open_source
from kdjax.generate import generate
from kdjax.models import Model, ModelSpec
from kdjax.named import models
from kdjax.sampling import AnswersConfig
from kdjax.train import train

RESULTS = harness.RESULTS / "knowledge.jsonl"
RECIPE = harness.ROOT / "configs" / "knowledge.py"

SPLITS = {"wording": "id", "fact": "fact"}
"""How questions are held out -> the column whose values are held out together."""

ANSWER_TOKENS = 12
STEPS = 100


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


def of_arm(arm: str, split: str, rate: float, seed: int, home: Path) -> harness.Row:
    """Return the figures of one run."""
    config = configs.load(str(RECIPE))
    data = replace(config.data, group_field=SPLITS[split], seed=seed)
    optim = replace(config.optim, learning_rate=rate)
    config = replace(config, data=data, optim=optim, seed=seed, steps=STEPS, eval_every=0)
    taught, run = ARMS[arm](config, home), home / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    if taught.answers.by == "teacher":
        (home / "answers").mkdir(exist_ok=True)
        write_answers(config, home / "answers")
        for name in (ANSWERS, PROGRESS):
            shutil.copy(home / "answers" / name, run)
    summary = train(taught, run)
    figures = {name: summary.get(name) for name in ("steps", "train_tokens", "seconds", "recovered", "forgetting")}
    return figures | accuracies(config, run)


def accuracies(config: Config, run: Path) -> harness.Row:
    """Return the share of held-out and of trained questions answered right, and each held-out answer's mark."""
    job = build(replace(config, answers=AnswersConfig()))
    held = {row["id"] for row in _held_out(config)}
    asked = questions(config.data, job.tokenizer, 0, 0)
    student = replace(config, teacher=None, student=ModelSpec(source=str(run)))
    base = replace(config, teacher=None, student=replace(config.teacher or ModelSpec()))
    found: harness.Row = {"held_out_questions": len(held)}
    views = {"closed-book before": (base, "student"), "open-book teacher": (base, "teacher")}
    for who, (whose, view) in {**views, "closed-book after": (student, "student")}.items():
        named, _ = models(whose, job.place)
        params = named.params(job.place, job.keys[0])
        right = _right(named.model, params, asked, view, job.tokenizer)
        marks = {one.columns["id"]: mark for one, mark in zip(asked, right, strict=True)}
        found[who] = {
            "held_out": _mean([mark for name, mark in marks.items() if name in held]),
            "trained": _mean([mark for name, mark in marks.items() if name not in held]),
        }
    return found


def _held_out(config: Config) -> list[Any]:
    """Return the rows that are held out, whichever way they are answered."""
    source = open_source(config.data.sources[0])
    return [source.record(int(row)) for _, row in split_documents([source], config.data).held_out]


def _right(model: Model, params: Any, asked: Sequence[Any], view: str, tokenizer: Any) -> list[bool]:
    said: list[list[int]] = []
    for first in range(0, len(asked), 32):
        prompts = [getattr(one, view) for one in asked[first : first + 32]]
        said += generate(model, params, prompts, max_new_tokens=ANSWER_TOKENS, eos_ids=tokenizer.eos_ids)
    texts = [tokenizer.decode(ids).lstrip().partition("\n")[0] for ids in said]
    return [one.columns["answer"].lower() in text.lower() for one, text in zip(asked, texts, strict=True)]


def _mean(marks: Sequence[bool]) -> dict[str, Any]:
    """Return a share with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(np.array(marks, float), (2_000, len(marks))).mean(1)
    return {"accuracy": float(np.mean(marks)), "interval": np.percentile(drawn, (2.5, 97.5)).tolist()}


def _best(rows: Sequence[harness.Row]) -> list[harness.Row]:
    """Return of each arm and split the run with the learning rate that has most right."""
    groups: dict[tuple[str, str], list[harness.Row]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["split"]), []).append(row)
    return [max(group, key=lambda row: row["closed-book after"]["held_out"]["accuracy"]) for group in groups.values()]


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/case-study.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.knowledge` writes the figures that stand here."
    lines = [
        "| held out by | taught | rate | before | after | after, trained questions | open book | forgetting (nats) |"
    ]
    lines += ["|:--|:--|--:|--:|--:|--:|--:|--:|"]
    place = lambda row: (list(SPLITS).index(row["split"]), list(ARMS).index(row["arm"]))  # noqa: E731
    for row in sorted(_best(rows), key=place):
        cells = [_cell(row[f"closed-book {when}"][part]) for when, part in _COLUMNS]
        forgotten = small(row["forgetting"]["kl"]) if row["forgetting"] else "–"
        open_book = _cell(row["open-book teacher"]["held_out"])
        rate = format(row["rate"], "g")
        lines.append(f"| {' | '.join([row['split'], row['arm'], rate, *cells, open_book, forgotten])} |")
    tried = sorted({row["rate"] for row in rows})
    here = rows[-1]["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"Share of answers that have the wanted one in them, 95 % bootstrap interval over questions; "
            f"{rows[-1]['steps']} steps each. Learning rates tried: {', '.join(f'{rate:g}' for rate in tried)}; of "
            f"each arm the best on these questions, so a little too good for all. {here['device']} "
            f"({here['platform']}); python {here['python']}, jax {here['jax']}; commit {here.get('commit')}.",
        ]
    )


_COLUMNS = (("before", "held_out"), ("after", "held_out"), ("after", "trained"))


def _cell(share: dict[str, Any]) -> str:
    low, high = map(percent, share["interval"])
    return f"{percent(share['accuracy'])} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=list(SPLITS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=Path("runs") / "knowledge", metavar="DIR")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="PATH")
    options = parser.parse_args(arguments)
    environment = harness.environment()
    done = {(row["arm"], row["split"], row["rate"], row["seed"]) for row in harness.read(options.results)}
    cases = [
        (arm, split, rate, options.seed) for split in options.splits for rate in options.rates for arm in options.arms
    ]
    for arm, split, rate, seed in [case for case in cases if case not in done]:
        row = {"what": "knowledge", "arm": arm, "split": split, "rate": rate, "seed": seed}
        row |= of_arm(arm, split, rate, seed, options.home)
        harness.append(options.results, [row | {"environment": environment}])
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
