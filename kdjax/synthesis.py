"""The job that makes up prompts for distillation, batch by batch, until there are enough that are unlike each other."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from kdjax.environment import describe
from kdjax.errors import UserError
from kdjax.lock import lock_run
from kdjax.metrics import write_json
from kdjax.prompts.config import PromptsConfig
from kdjax.prompts.journal import Journal
from kdjax.prompts.open import open_speaker
from kdjax.prompts.speaker import How
from kdjax.prompts.synthetic import WAYS, Pool
from kdjax.sampling import Sampling
from kdjax.search import SUMMARY, claim, given

log = logging.getLogger(__name__)

FRUITLESS = 5
"""The job ends after so many batches in a row of which nothing was kept."""


def synthesise(config: PromptsConfig, directory: Path) -> dict[str, Any]:
    """Return how many prompts were kept and dropped, and why; prompts.jsonl has one a line, in the field `prompt`.

    Run again, it goes on where it was stopped: batches.jsonl has what was written.

    Raises:
        UserError: whatever of the config cannot be, or a model of which nothing is kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with lock_run(directory):
        began = time.monotonic()
        claim(config, directory)
        pool = _filled(config, directory)
        if not pool.made:
            raise UserError(f"nothing that {config.proposer.source} wrote was kept ({dict(pool.dropped)})")
        lines = (json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in pool.made)
        (directory / "prompts.jsonl").write_text("".join(lines), "utf-8", "surrogatepass")
        found = {"make": config.make, "proposer": config.proposer.source, "kept": len(pool.made)}
        found |= {"dropped": dict(pool.dropped), "seconds": time.monotonic() - began, "environment": describe()}
        write_json(directory / SUMMARY, found)
    return found


def _filled(config: PromptsConfig, directory: Path) -> Pool:
    """Return the pool once it is full, or nothing comes any more."""
    pool = Pool([one.text for one in given(config)])
    journal, speaker = Journal(directory / "batches.jsonl", ("batch",)), open_speaker(config.proposer)
    how = How(config.proposal_tokens, sampling=Sampling(config.proposal_temperature))
    number, fruitless = 0, 0
    while len(pool.made) < config.count and fruitless < FRUITLESS:
        row, before = journal.get(number), len(pool.made)
        if row is None:
            draw, seed = Random(f"{config.seed} {number}"), (config.seed + 7919 * number) % 2**31
            texts = WAYS[config.make](speaker, pool, config.proposer.batch_size, replace(how, seed=seed), draw)
            row = {"batch": number, "texts": texts}
            journal.add([row])
        for text in row["texts"]:
            if len(pool.made) < config.count:
                pool.offer(text)
        fruitless = 0 if len(pool.made) > before else fruitless + 1
        number += 1
        log.info("%d of %d prompts; dropped: %s", len(pool.made), config.count, dict(pool.dropped) or "none")
    if len(pool.made) < config.count:
        log.warning("%d batches in a row brought nothing new, so it ends with %d prompts", FRUITLESS, len(pool.made))
    return pool
