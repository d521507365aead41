"""The job that says what prompts change on a task: scores, sensitivity, likelihood, calibration, divergence, cost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.environment import describe
from kdjax.errors import UserError
from kdjax.lock import lock_run
from kdjax.metrics import write_json
from kdjax.prompts.bench import KEY
from kdjax.prompts.config import EffectConfig
from kdjax.prompts.effect import Ledger, Study, Variant, by_shots, calibrations, sensitivity
from kdjax.prompts.effect_figures import Figures, break_even, by_position
from kdjax.prompts.effect_model import cache_bytes, compare, seconds
from kdjax.prompts.journal import Journal
from kdjax.prompts.local import Local, open_local
from kdjax.prompts.score import CONTENT_FREE, scoring_as
from kdjax.prompts.select import interval
from kdjax.prompts.splits import Splits, read_examples, split_as
from kdjax.prompts.tasks import NONE, Candidate, Example, show
from kdjax.search import EVERY_SECONDS, claim, given, read_best

log = logging.getLogger(__name__)

EFFECT = "effect.json"
"""All figures; written last of all."""


def effect(config: EffectConfig, directory: Path) -> Figures:
    """Return what the prompts change; evaluations.jsonl and effect.json are written.

    Run again, it goes on where it was stopped, and pays for nothing twice.

    Raises:
        UserError: whatever of the config cannot be, or something else in the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with lock_run(directory):
        began = time.monotonic()
        claim(config, directory)
        if (directory / EFFECT).exists():
            log.info("%s is there already", directory / EFFECT)
            return json.loads((directory / EFFECT).read_text("utf-8"))
        found = _found(config, directory)
        found |= {"seconds": time.monotonic() - began, "environment": describe()}
        write_json(directory / EFFECT, found)
    return found


def _found(config: EffectConfig, directory: Path) -> Figures:
    own, paid = config.prompts, distil_seconds(config)
    scoring = scoring_as(own)
    examples = read_examples(own.sources, own.input, own.answer)
    scoring.check(examples)
    splits = split_as(own, examples)
    candidates = read_candidates(config, splits)
    local = open_local(own.scorer)
    if local.model.config.encoder_layers:
        raise UserError(f"{local.name} is an encoder-decoder; the effect of prompts is analysed on decoders alone")
    ledger = Ledger(local, scoring, splits.test, Journal(directory / "evaluations.jsonl", KEY))
    ledger.report = _progress(ledger)
    study = Study(config, scoring, candidates[0], splits.propose)
    shown = candidates[0] if candidates[0].shots else study.drawn(min(own.shots, len(splits.propose)), 0)
    log.info("1 of 4: %d prompts on %d examples", len(candidates), len(splits.test))
    found = {
        "task": own.task,
        "measure": scoring.measure,
        "scorer": local.name,
        "calibrated": scoring.needs_priors,
        "examples": len(splits.test),
        **_scores(ledger, candidates, own.seed),
    }
    log.info("2 of 4: order, examples, format and words varied")
    found["sensitivity"] = sensitivity(ledger, replace(study, candidate=shown))
    found["varied_shots"] = len(shown.shots)
    log.info("3 of 4: the number of worked examples varied")
    found["shots"] = by_shots(ledger, study, _most_shots(local, ledger, study))
    if scoring.by_labels:
        both = {"prompted": Variant("", candidates[0], scoring), "unprompted": Variant("", NONE, scoring)}
        found["calibration"] = calibrations(ledger, both, config.bins)
    log.info("4 of 4: divergence by position, and seconds of a request")
    found |= _inside(local, ledger, candidates[0], own.seed)
    return found | {"cost": _cost(local, ledger, candidates[0], paid)}


def _progress(ledger: Ledger) -> Callable[[], None]:
    """Return what says, every few seconds, how many evaluations were made."""
    shown = time.monotonic()

    def report() -> None:
        nonlocal shown
        if time.monotonic() - shown >= EVERY_SECONDS:
            shown = time.monotonic()
            log.info("%d evaluations", ledger.paid)

    return report


def read_candidates(config: EffectConfig, splits: Splits) -> list[Candidate]:
    """Return the prompts that are analysed, the one that is looked at closely first.

    Raises:
        UserError: there is none, a file that has none, or one that shows what is measured on.
    """
    path = Path(config.candidates).expanduser()
    found = (_of_file(path, config) if config.candidates else given(config.prompts))[: config.most_prompts]
    if not found:
        raise UserError("there is no prompt; give prompts.instructions, or candidates: a search's prompts.jsonl")
    unseen = {example.key for example in splits.test}
    for shot in (shot for one in found for shot in one.shots if shot.key in unseen):
        raise UserError(
            f"{path} shows the example {shot.input[:60]!r}, which is measured on; give its search's own "
            "sources, rows and seed"
        )
    return found


def _of_file(path: Path, config: EffectConfig) -> list[Candidate]:
    """Return the candidates of a search, the winner first, then those that came furthest and scored highest.

    Of its best.txt there is one, or none where it says nothing before the input.
    """
    if path.suffix != ".jsonl":
        return [one for one in [read_best(path, config.prompts)] if one.text]
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8", "surrogatepass").splitlines() if line.strip()]
        rows.sort(key=lambda row: (row["is_best"], len(row["scores"]), row["scores"][-1]["mean"]), reverse=True)
        return [Candidate(row["text"], tuple(Example(**shot) for shot in row["shots"])) for row in rows]
    except OSError as error:
        raise UserError(f"candidates {path} cannot be read: {error.strerror}; name a search's prompts.jsonl") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"candidates {path} is no prompts.jsonl of a search ({error}); name one") from None


def distil_seconds(config: EffectConfig) -> float | None:
    """Return how long distilling the prompt takes, None where that is not known.

    Raises:
        UserError: a run that does not say so.
    """
    if not config.distil_run:
        return config.distil_seconds or None
    path = Path(config.distil_run).expanduser() / "summary.json"
    try:
        return float(json.loads(path.read_text("utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} has no seconds of a finished run; name one that is, or give distil_seconds") from None


def _scores(ledger: Ledger, candidates: Sequence[Candidate], seed: int) -> Figures:
    """Return the score of each prompt and without one, and what each gains at the same examples."""
    bare_J = ledger.scores(Variant("", NONE, ledger.scoring))
    rows = []
    for one in candidates:
        scores_J = ledger.scores(Variant("", one, ledger.scoring))
        row = {"id": one.id, "text": one.text, "shots": len(one.shots), **interval(scores_J, seed)}
        rows.append(row | {"gain": interval(scores_J - bare_J, seed)})
    return {"prompts": rows, "without": interval(bare_J, seed)}


def _most_shots(local: Local, ledger: Ledger, study: Study) -> int:
    """Return the largest number of worked examples that every draw has, and the context holds behind any input."""
    longest = max((one.input for one in ledger.examples), key=lambda text: len(local.prompt_ids(text)))
    answers = ledger.scoring.labels or [one.answer for one in ledger.examples]
    room = max(len(local.answer_ids(answer)) for answer in answers)
    room = room if ledger.scoring.by_labels else max(room, ledger.scoring.max_new_tokens)
    most = min(study.config.most_shots, len(study.pool))

    def fits(count: int) -> bool:
        shown = [study.drawn(count, n) for n in range(study.config.draws)]
        asked = [show(ledger.scoring.task, one, text) for one in shown for text in (longest, *CONTENT_FREE)]
        return max(len(local.prompt_ids(text)) for text in asked) + room <= local.model.config.max_positions

    while most and not fits(most):
        most //= 2
    return most


def _inside(local: Local, ledger: Ledger, candidate: Candidate, seed: int) -> Figures:
    """Return the wanted answers' log-likelihood with the prompt and without it, and the divergence by position."""

    def ask(pairs: Sequence[tuple[Candidate, Example]]) -> list[dict[str, Any]]:
        task = ledger.scoring.task
        asked = [(show(task, one, e.input), show(task, NONE, e.input), e.answer) for one, e in pairs]
        return [one._asdict() for one in compare(local, asked)]

    rows = ledger.rows("compared", [(candidate, example) for example in ledger.examples], ask)
    means = {who: np.array([np.mean(row[who]) for row in rows]) for who in ("prompted", "unprompted")}
    likelihood = {who: interval(values_J, seed) for who, values_J in means.items()}
    likelihood["gain"] = interval(means["prompted"] - means["unprompted"], seed)
    return {"likelihood": likelihood, "kl": by_position([row["kl"] for row in rows], seed)}


def _cost(local: Local, ledger: Ledger, candidate: Candidate, paid: float | None) -> Figures:
    """Return tokens, seconds and bytes of a request with the prompt and without it, and when distilling pays."""
    task, asked = ledger.scoring.task, {"with_prompt": candidate, "without": NONE}
    by_length = sorted(ledger.examples, key=lambda one: len(local.prompt_ids(show(task, NONE, one.input))))
    median = by_length[len(by_length) // 2]

    def ask(pairs: Sequence[tuple[Candidate, Example]]) -> list[dict[str, Any]]:
        timed = seconds(local, [show(task, one, example.input) for one, example in pairs])
        return [{name: [one[name] for one in timed] for name in ("prefill", "decode")}] * len(pairs)

    row = ledger.rows("cost", [(one, median) for one in asked.values()], ask)[0]
    found: Figures = {"request_tokens": len(local.prompt_ids(show(task, NONE, median.input)))}
    for number, (who, one) in enumerate(asked.items()):
        read = [len(local.prompt_ids(show(task, one, example.input))) for example in ledger.examples]
        written = _written(local, ledger, one, read)
        times = {name: row[name][number] for name in ("prefill", "decode")}
        request = times["prefill"] + max(written - 1, 0) * times["decode"]
        tokens = {"prompt_tokens": float(np.mean(read)), "answer_tokens": written}
        cache = cache_bytes(local.model, round(float(np.mean(read)) + written))
        found[who] = tokens | times | {"seconds": request, "cache_bytes": cache}
    saved = found["with_prompt"]["seconds"] - found["without"]["seconds"]
    found["saved_seconds"] = saved
    if paid is not None:
        requests = break_even(paid, found["with_prompt"]["seconds"], found["without"]["seconds"])
        found["break_even"] = {"distil_seconds": paid, "requests": requests, "never": requests is None}
    return found


def _written(local: Local, ledger: Ledger, candidate: Candidate, read: Sequence[int]) -> float:
    """Return the mean number of an answer's tokens: of those that are written, or else of the wanted ones."""
    if ledger.writes:
        rows = ledger.answers(Variant("", candidate, ledger.scoring))
        return float(np.mean([row["tokens"] - before for row, before in zip(rows, read, strict=True)]))
    return float(np.mean([len(local.answer_ids(example.answer)) for example in ledger.examples]))
