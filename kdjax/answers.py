"""Answers of the prompted teacher: sampled once, and kept in a file that a person can read and edit."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from kdjax import data
from kdjax.build import other_tokenizer, tokenizer_of
from kdjax.config import Config
from kdjax.console import duration
from kdjax.data import DataConfig, Question
from kdjax.errors import UserError
from kdjax.fields import differences_of
from kdjax.generate import check_prompts, generate, settled
from kdjax.metrics import write_json
from kdjax.named import Named, models
from kdjax.remote import written
from kdjax.sharding import Placement, placement

ANSWERS, PROGRESS = "answers.jsonl", "answers.json"
"""The rows with their answers; how they came about, and how many are done."""

Answer = Callable[[Sequence[Sequence[int]], int], list[str]]
"""Of prompts' tokens, and the number of the first: what is said to each. A draw goes by the seed and that number."""

log = logging.getLogger(__name__)


def answered(config: Config, directory: Path) -> DataConfig:
    """Return the data that a run trains on: with the teacher's answers, where these are wanted, sampled if need be.

    Raises:
        UserError: prompts that cannot be answered, or answers there that came about otherwise.
    """
    if config.answers.by == "data" or config.cache:  # a cache has the rows, answers and all
        return config.data
    write_answers(config, directory)
    return replace(config.data, sources=(f"jsonl:{glob.escape(str(directory / ANSWERS))}",), weights=())


def write_answers(config: Config, directory: Path) -> Path:
    """Return the file of answers, all of them there; sampling goes on where it was stopped.

    Raises:
        UserError: as `answered` does.
    """
    path, wanted = directory / ANSWERS, _settings(config)
    progress = _progress(directory, wanted)
    if path.is_file() and progress.get("done") == progress.get("of", -1):
        return path
    if jax.process_count() > 1:
        raise UserError(f"{path} is not there yet, and one process samples it: run `kdjax answers` with this config")
    place = placement(config.mesh)
    student, teacher = models(config, place)
    if teacher is None and not config.teacher_server.source:
        raise UserError("no model answers: the config has no teacher; name one")
    tokenizer = tokenizer_of(config, student, teacher)
    tokenizer = other_tokenizer(config, tokenizer, teacher) or tokenizer
    data.check_fits(tokenizer, (teacher or student).model.config.vocab_size)
    asked = data.questions(config.data, tokenizer, config.answers.count, config.answers.seed, config.student.gist)
    _check(asked, config, teacher)
    if not progress:
        progress = {"settings": wanted, "done": 0, "bytes": 0, "dropped": {}, "of": len(asked)}
        write_json(directory / PROGRESS, progress)
    answer = _answering(config, place, teacher, tokenizer)
    log.info("%d prompts, of which %d are answered in %s", len(asked), progress["done"], path)
    with path.open("ab") as file:
        file.truncate(progress["bytes"])
        began, first = time.perf_counter(), progress["done"]
        while progress["done"] < len(asked):
            _more(config, asked, answer, file, progress)
            write_json(directory / PROGRESS, progress)
            spent, done = time.perf_counter() - began, progress["done"]
            left = spent / (done - first) * (len(asked) - done)
            log.info("%d of %d answered, eta %s", done, len(asked), duration(left))
    if progress["dropped"]:
        log.info("dropped: %s", ", ".join(f"{count} {why}" for why, count in progress["dropped"].items()))
    return path


def _settings(config: Config) -> dict[str, Any]:
    """Return what answers depend on, as JSON gives it back."""
    unread = ("batch_size", "student_share", "teacher_share", "reuse", "clip_ratio", "behaviour", "unrelated")
    shown = ("sources", "tokenizer", "teacher_tokenizer", "chat_template", "teacher_view", "prompt_field")
    whole = asdict(config)
    answers = {name: value for name, value in whole["answers"].items() if name not in unread}
    text = {name: whole["data"][name] for name in shown}
    teacher = whole["teacher"] or config.teacher_server.name
    return json.loads(json.dumps({"answers": answers, "data": text, "teacher": teacher}))


def _progress(directory: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return how far sampling has come; nothing where it has not begun.

    Raises:
        UserError: it was begun with other settings.
    """
    try:
        found = json.loads((directory / PROGRESS).read_text("utf-8"))
        changed = differences_of(found["settings"], wanted)
    except FileNotFoundError:
        if (directory / ANSWERS).exists():
            raise UserError(
                f"{directory / ANSWERS} is there without {PROGRESS}, which says how it came about; move it away to "
                "sample anew, or train on it: --answers.by data --data.sources jsonl:FILE"
            ) from None
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / PROGRESS} is damaged ({error}); move both files away to sample anew") from None
    if changed:
        raise UserError(
            f"{directory / ANSWERS} was sampled otherwise ({'; '.join(changed[:3])}); choose another --run-dir, or "
            f"move {ANSWERS} and {PROGRESS} away to sample anew"
        )
    return found


def _check(asked: Sequence[Question], config: Config, teacher: Named | None) -> None:
    """Check before the first answer that each prompt can have one that fits."""
    if not asked:
        raise UserError("no prompt to answer; give data.sources with some")
    most = config.answers.tokens
    if teacher is not None:
        check_prompts(teacher.model, [question.teacher for question in asked], most)
    for question in asked:
        room = config.data.sequence_length - len(question.student) - 1
        if room < most and not config.data.max_bad_rows:
            raise UserError(
                f"{question.where}: its prompt has {len(question.student)} tokens, which with an answer of {most} is "
                f"more than data.sequence_length {config.data.sequence_length}; raise that, or lower answers.tokens"
            )


def _more(config: Config, asked: Sequence[Question], answer: Answer, file: Any, progress: dict[str, Any]) -> None:
    """Answer the next batch: write its rows, and note in `progress` what was done and dropped."""
    own, first = config.answers, progress["done"]
    batch = asked[first : first + own.batch_size]
    said = answer([question.teacher for question in batch], first)
    dropped = Counter(progress["dropped"])
    for question, text in zip(batch, said, strict=True):
        thoughts, text = _parted(text.rstrip(), own.scratchpad)
        text = settled(text, own.stop, is_over=True)[0]
        if not text.strip():
            dropped["without an answer"] += 1
            continue
        if not re.search(own.only, text):
            dropped["without what answers.only asks for"] += 1
            continue
        row = {**question.columns, **thoughts, config.data.answer_field: text}
        file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
    progress |= {"done": first + len(batch), "bytes": file.tell(), "dropped": dict(dropped)}


def _answering(config: Config, place: Placement, teacher: Named | None, tokenizer: data.Tokenizer) -> Answer:
    """Return what answers: the teacher or, where there is none, its server."""
    own = config.answers
    if teacher is None:
        return partial(written, config.teacher_server, own)
    params = teacher.params(place, jax.random.split(jax.random.key(config.seed))[1], teacher.model.dtype)
    how = {"max_new_tokens": own.tokens, "sampling": own.sampling, "eos_ids": tokenizer.eos_ids, "seed": own.seed}

    def answer(prompts: Sequence[Sequence[int]], first: int) -> list[str]:
        return [tokenizer.decode(ids) for ids in generate(teacher.model, params, prompts, first=first, **how)]

    return answer


def _parted(text: str, end: str) -> tuple[dict[str, str], str]:
    """Return the column of a scratchpad that ends with `end`, and what comes after; all is the answer without one."""
    if not end:
        return {}, text
    thoughts, found, answer = text.partition(end)
    space = answer[: len(answer) - len(answer.lstrip())]
    return {data.SCRATCHPAD: thoughts + found + space}, answer.lstrip() if found else ""
