"""The job that finds a prompt: rounds of proposing and selecting, then one report on examples that neither has seen."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdjax import config as configs
from kdjax.environment import describe
from kdjax.errors import UserError
from kdjax.fields import differences
from kdjax.jobs import read_prompts
from kdjax.lock import lock_run
from kdjax.metrics import write_json
from kdjax.prompts.bench import BLOCK, KEY, Bench, rank
from kdjax.prompts.config import PromptsConfig, SpeakerConfig
from kdjax.prompts.journal import Journal, Remembering
from kdjax.prompts.open import open_speaker
from kdjax.prompts.propose import SHOWN, Workshop, propose
from kdjax.prompts.score import scoring_as
from kdjax.prompts.select import SELECTORS
from kdjax.prompts.speaker import How, Speaker
from kdjax.prompts.splits import Splits, read_examples, split_as
from kdjax.prompts.tasks import NONE, TASKS, Candidate, Example, short, show, template
from kdjax.prompts.verdict import Baseline, verdict
from kdjax.sampling import Sampling

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
"""Between two lines of progress."""

FAILURES = 16
"""Examples at which a candidate is tried to find where it fails."""

BEST, SUMMARY = "best.txt", "summary.json"
"""The winner as a view of a row; and what is written last of all."""

Summary = dict[str, Any]


@dataclass
class Search:
    """What a search knows so far.

    Attributes:
        config: of the search.
        splits: the examples.
        bench: where candidates are evaluated.
        workshop: where they are made.
        born: all candidates by id, in the order in which they came.
        rounds: of each round the candidates' mean scores and numbers of examples, by id.
    """

    config: PromptsConfig
    splits: Splits
    bench: Bench
    workshop: Workshop
    born: dict[str, Candidate] = field(default_factory=dict)
    rounds: list[dict[str, tuple[float, int]]] = field(default_factory=list)


def search(config: PromptsConfig, directory: Path) -> Summary:
    """Return the summary of a search; prompts.jsonl, evaluations.jsonl, best.txt and summary.json are written.

    Run again, it goes on where it was stopped, and pays for nothing twice.

    Raises:
        UserError: whatever of the config cannot be, or another search in the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with lock_run(directory):
        began = time.monotonic()
        claim(config, directory)
        if (directory / SUMMARY).exists():
            log.info("%s has its prompt already", directory)
            return json.loads((directory / SUMMARY).read_text("utf-8"))
        job = _begin(config, directory)
        best = _select(job)[0]
        _write(job, best, directory)
        log.info("reporting on %d examples that nothing has seen", len(job.splits.test))
        found = _summary(job, best)
        found |= {"seconds": time.monotonic() - began, "environment": describe()}
        write_json(directory / SUMMARY, found)
    return found


def claim(config: Any, directory: Path, free: Sequence[str] = ()) -> None:
    """Write the config into a run directory, unless another one is there; its fields in `free` may differ.

    Raises:
        UserError: the directory holds something else.
    """
    saved = directory / "config.json"
    if saved.exists():
        found = configs.load(str(saved), type(config))
        different = differences(replace(found, **{name: getattr(config, name) for name in free}), config)
        if different:
            raise UserError(
                f"{directory} holds a job whose config differs ({'; '.join(different[:5])}); choose another "
                "--run-dir, or delete that job"
            )
    elif strangers := sorted(path.name for path in directory.iterdir() if path.name != ".lock"):
        raise UserError(f"{directory} holds {strangers[0]!r} but no job; choose another --run-dir, or empty it")
    write_json(saved, asdict(config))


def _begin(config: PromptsConfig, directory: Path) -> Search:
    """Return the search before its first round, all that can be checked beforehand checked."""
    scoring = scoring_as(config)
    examples = read_examples(config.sources, config.input, config.answer)
    scoring.check(examples)
    splits = split_as(config, examples)
    log.info("examples to propose with, select by and report on: %d, %d, %d", *map(len, vars(splits).values()))
    scorer, proposer, critic = _speakers(config, directory)
    block = config.scorer.batch_size if config.scorer.is_server else BLOCK
    bench = Bench(scorer, scoring, Journal(directory / "evaluations.jsonl", KEY), block=block)
    how = How(config.proposal_tokens, sampling=Sampling(config.proposal_temperature), seed=config.seed)
    workshop = Workshop(
        scoring.task,
        splits.propose,
        lambda candidate: _failures(bench, splits.propose, candidate),
        proposer,
        critic,
        config.shots,
        how,
    )
    return Search(config, splits, bench, workshop)


def _speakers(config: PromptsConfig, directory: Path) -> tuple[Speaker, Speaker | None, Speaker | None]:
    """Return scorer, proposer and critic; one that is named twice is opened once."""
    opened: dict[SpeakerConfig, Speaker] = {}
    sayings = Journal(directory / "proposals.jsonl", ("key",))

    def opened_once(spec: SpeakerConfig) -> Speaker:
        if spec not in opened:
            opened[spec] = open_speaker(spec)
        return opened[spec]

    def remembering(spec: SpeakerConfig) -> Speaker | None:
        return Remembering(opened_once(spec), sayings, spec.batch_size) if spec.source else None

    critic = config.critic if config.critic.source else config.proposer
    return opened_once(config.scorer), remembering(config.proposer), remembering(critic)


def _failures(bench: Bench, examples: Sequence[Example], candidate: Candidate) -> list[tuple[Example, str]]:
    """Return the examples to propose with at which a candidate does worst, with what was said; none that is right."""
    some = [example for example in examples if example not in candidate.shots][:FAILURES]
    found = zip(bench.ask("propose", [(candidate, example) for example in some]), some, strict=True)
    worst = sorted(((one.score, number, example, one.said) for number, (one, example) in enumerate(found)))
    return [(example, said) for score, _, example, said in worst[:SHOWN] if score < 1.0]


def given(config: PromptsConfig) -> list[Candidate]:
    """Return the candidates that a person wrote."""
    texts = [
        line
        for text in config.instructions
        for line in (read_prompts(Path(text[1:]).expanduser()) if text.startswith("@") else [text])
    ]
    return [Candidate(text) for text in dict.fromkeys(text.strip() for text in texts) if text]


def _select(job: Search) -> list[Candidate]:
    """Return the candidates that the last round left, the best first.

    Raises:
        UserError: there is no candidate.
    """
    config, alive = job.config, given(job.config)
    for number in range(config.rounds):
        seed = f"{config.seed} {number}"
        alive = [*alive, *propose(job.workshop, config.methods, alive, config.children, seed)]
        if not alive:
            raise UserError(
                "there is no candidate: give instructions, or a method that needs none (ape, with a proposer)"
            )
        job.born |= {candidate.id: candidate for candidate in alive if candidate.id not in job.born}
        what, budget = f"round {number + 1} of {config.rounds}: {len(alive)} candidates", config.budget // config.rounds
        job.bench.report = _progress(job.bench, what, budget)
        ranked, scores_QJ = rank(job.bench, "select", alive, job.splits.select, SELECTORS[config.selector], budget)
        known = ((one.id, row_J[~np.isnan(row_J)]) for one, row_J in zip(alive, scores_QJ, strict=True))
        job.rounds.append({id: (float(row_J.mean()), len(row_J)) for id, row_J in known})
        alive = ranked[: config.beam]
        mean, count = job.rounds[-1][alive[0].id]
        log.info("%s; best %s %.4g (%d examples): %s", what, job.bench.scoring.measure, mean, count, short(alive[0]))
    return alive


def _progress(bench: Bench, what: str, budget: int) -> Callable[[], None]:
    """Return what says, every few seconds, how much of the budget is spent."""
    shown, first = time.monotonic(), bench.spent["select"]

    def report() -> None:
        nonlocal shown
        if time.monotonic() - shown >= EVERY_SECONDS:
            shown = time.monotonic()
            log.info("%s, %d of %d evaluations", what, bench.spent["select"] - first, budget)

    return report


def _summary(job: Search, best: Candidate) -> Summary:
    """Return what was found, and how it does on examples that nothing has seen."""
    config, bench = job.config, job.bench
    mean, count = job.rounds[-1][best.id]
    baseline = Baseline(SELECTORS[config.selector], config.few_shot_baseline)
    bench.report = lambda: None
    return {
        "task": config.task,
        "measure": bench.scoring.measure,
        "scorer": bench.speaker.name,
        "best": {"id": best.id, "text": best.text, "shots": len(best.shots), "method": best.method},
        "candidates": len(job.born),
        "selection": {"score": mean, "examples": count},
        **verdict(bench, job.splits, list(job.born.values()), best, mean, baseline, config.seed),
        "evaluations": dict(bench.spent),
        "tokens": dict(bench.tokens),
        "examples": {name: len(part) for name, part in vars(job.splits).items()},
    }


def _write(job: Search, best: Candidate, directory: Path) -> None:
    """Write prompts.jsonl, all candidates with what they were worth, and best.txt, the winner as a view of a row."""
    lines = []
    for candidate in job.born.values():
        scores = [
            {"round": number, "mean": found[candidate.id][0], "examples": found[candidate.id][1]}
            for number, found in enumerate(job.rounds, 1)
            if candidate.id in found
        ]
        row = {"id": candidate.id, "text": candidate.text, "shots": [asdict(shot) for shot in candidate.shots]}
        row |= {"method": candidate.method, "parents": candidate.parents, "scores": scores}
        row |= {"evaluations": scores[-1]["examples"], "is_best": candidate.id == best.id}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (directory / "prompts.jsonl").write_text("".join(lines), "utf-8", "surrogatepass")
    is_chat = job.config.scorer.chat or job.config.scorer.is_server
    (directory / BEST).write_text(
        template(job.bench.scoring.task, best, job.config.input, is_chat), "utf-8", "surrogatepass"
    )


def read_best(path: Path, config: PromptsConfig) -> Candidate:
    """Return what best.txt says before the input, as a search wrote it or a person edited it; examples are its text.

    Raises:
        UserError: it cannot be read, asks otherwise than the task does, or takes more of a row than the input.
    """
    try:
        text = path.read_text("utf-8", "surrogatepass")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; name a search's best.txt") from None
    turn = re.fullmatch(r"\{% set turn %\}\n(.*)\{% endset %\}\n\{\{ chat\(.*\) \}\}\s*", text, re.DOTALL)
    text, brace = (turn[1] if turn else text).rstrip(), '{{ "{" }}'
    end = show(TASKS[config.task], NONE, "\0").replace("\0", config.input)
    if not text.endswith(end):
        raise UserError(f"{path} does not end with {end!r}; wanted the best.txt of a search of the same task")
    text = text.removesuffix(end).rstrip()
    if found := re.search(r"\{[{%#].*", text.replace(brace, "")):
        raise UserError(f"{path} has {found[0][:40]!r} before the input; wanted the same words for every row")
    return Candidate(text.replace(brace, "{"))
