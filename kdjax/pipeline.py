"""One prompt from first to last: generate and select it, distil it into weights, evaluate; a file after each stage.

A stage whose file is there is not done again, so each may be read and edited before the next one starts from it.
"""

from __future__ import annotations

import glob
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.config import Config
from kdjax.environment import describe
from kdjax.errors import UserError
from kdjax.lock import lock_run
from kdjax.metrics import write_json
from kdjax.prompts.bench import KEY, Bench
from kdjax.prompts.config import PromptsConfig
from kdjax.prompts.journal import Journal
from kdjax.prompts.open import open_speaker
from kdjax.prompts.score import scoring_as
from kdjax.prompts.select import interval
from kdjax.prompts.splits import Splits, plain, read_examples, split_as
from kdjax.prompts.tasks import NONE, TASKS, Candidate, template
from kdjax.search import BEST, claim, read_best, search
from kdjax.train import train

EXAMPLES, QUESTIONS, SUMMARY = "examples.jsonl", "questions.jsonl", "summary.json"
SEARCH, DISTIL = "search", "distil"
"""Directories of the two jobs."""

log = logging.getLogger(__name__)

Summary = dict[str, Any]


@dataclass(frozen=True)
class PipelineConfig:
    """A search for a prompt, and the distillation of what it finds. A recipe in configs/ returns one."""

    search: PromptsConfig
    """Which prompt is sought, for which task, on which rows."""
    distil: Config
    """How it is distilled. Its data's sources and views are the pipeline's: answers to the search's rows, behind the
    prompt that was found, and behind none."""
    name: str = "pipeline"
    """The run directory is runs/NAME unless --run-dir says otherwise."""

    def __post_init__(self) -> None:
        if self.search.make != "search":
            raise UserError(f"search.make is {self.search.make!r}; a pipeline wants 'search'")
        if self.search.scorer.is_server:
            raise UserError("search.scorer is a server, which gives no logits to distil; name a local model")


def pipeline(config: PipelineConfig, directory: Path) -> Summary:
    """Return what the whole has come to; each stage goes on where it was stopped.

    Raises:
        UserError: whatever of the config cannot be, or something else in the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with lock_run(directory):
        claim(config, directory, free=("distil",))  # training checks its own config once it has begun
        return _stages(config, directory)


def _stages(config: PipelineConfig, directory: Path) -> Summary:
    began = time.monotonic()
    _once(directory / EXAMPLES, lambda: _examples(config))
    own = replace(config.search, sources=(_named(directory / EXAMPLES),), input="{{ prompt }}", answer="{{ answer }}")
    log.info("1 of 3: a prompt is sought (%s)", directory / SEARCH)
    found = search(own, directory / SEARCH)
    splits = split_as(own, read_examples(own.sources, own.input, own.answer))
    _once(directory / QUESTIONS, lambda: _questions(own, splits))
    best = read_best(directory / SEARCH / BEST, own)
    log.info("2 of 3: it is distilled (%s)", directory / DISTIL)
    run = train(_distil(config, own, best, directory), directory / DISTIL)
    log.info("3 of 3: evaluated on %d examples that nothing has seen", len(splits.test))
    summary: Summary = {"prompt": best.text, "search": found}
    summary |= {
        "distil": {
            name: run[name] for name in ("recovered", "recovered_interval", "recovered_prompts", "saved") if name in run
        }
    }
    summary |= {"measure": found["measure"], **_tested(own, splits, best, directory)}
    summary |= {"seconds": time.monotonic() - began, "environment": describe()}
    write_json(directory / SUMMARY, summary)
    return summary


def _once(path: Path, rows: Callable[[], Iterable[Mapping[str, str]]]) -> None:
    """Write a file of rows, whole or not at all, unless there is one."""
    if path.exists():
        return
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), "utf-8")
    beside.replace(path)


def _named(path: Path) -> str:
    return f"jsonl:{glob.escape(str(path))}"


def _examples(config: PipelineConfig) -> Iterable[Mapping[str, str]]:
    given = read_examples(config.search.sources, config.search.input, config.search.answer)
    return ({"prompt": one.input, "answer": one.answer} for one in given)


def _questions(own: PromptsConfig, splits: Splits) -> Iterable[Mapping[str, str]]:
    """Yield each different input once, but for those that are reported on."""
    seen = {plain(one.input) for one in splits.test}
    for one in read_examples(own.sources, own.input, own.answer):
        if (text := plain(one.input)) not in seen:
            seen.add(text)
            yield {"prompt": one.input}


def _distil(config: PipelineConfig, own: PromptsConfig, best: Candidate, directory: Path) -> Config:
    """Return the config of the distillation: the teacher sees the prompt that was found, the student none."""
    prompted, bare = (template(TASKS[own.task], one, own.input, own.scorer.chat) for one in (best, NONE))
    data = replace(
        config.distil.data,
        sources=(_named(directory / QUESTIONS),),
        packing="first_fit",
        teacher_view=prompted,
        student_view=bare,
    )
    return replace(config.distil, data=data, answers=replace(config.distil.answers, by="teacher"))


def _tested(own: PromptsConfig, splits: Splits, best: Candidate, directory: Path) -> Summary:
    """Return the scores of the prompted model, the unprompted one and the distilled one, with their 95 % intervals.

    `gains` are those of the prompted and the distilled model over the unprompted one, at the same examples.
    """
    scoring, journal = scoring_as(own), Journal(directory / "evaluations.jsonl", KEY)
    student = replace(own.scorer, source=str(directory / DISTIL))
    scores = {}
    for model, asked in {own.scorer: {"unprompted": NONE, "prompted": best}, student: {"distilled": NONE}}.items():
        bench = Bench(open_speaker(model), scoring, journal)
        for name, candidate in asked.items():
            found = bench.ask(name, [(candidate, example) for example in splits.test])
            scores[name] = np.array([one.score for one in found])
    gains = {name: scores[name] - scores["unprompted"] for name in ("prompted", "distilled")}
    shown = {"test": scores, "gains": gains}
    return {what: {name: interval(x_J, own.seed) for name, x_J in of.items()} for what, of in shown.items()}
