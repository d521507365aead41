"""What a cache of a teacher's says must agree on with a run that reads it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdjax import data
from kdjax.config import Config, differences_of
from kdjax.data.views import load_views
from kdjax.errors import UserError
from kdjax.losses.schedules import ends
from kdjax.named import Named

FREE = ("max_shards", "max_bad_rows", "seed")
"""Of `DataConfig`: does not change what an example says. The seed is that of the rows' order, which a cache fixes."""


def temperature_of(config: Config) -> float:
    """Return the one temperature at which a config compares logits.

    Raises:
        UserError: it has several, or one that changes.
    """
    found = {end for term in config.objective.all_terms for end in ends(term.temperature, "objective.temperature")}
    if len(found) != 1:
        raise UserError(
            f"the objective compares at the temperatures {', '.join(f'{t:g}' for t in sorted(found))}, but a top-k or "
            "draws are of one; give it one constant temperature, or --label.kind hidden"
        )
    return found.pop()


def settings_of(config: Config, tokenizer: data.Tokenizer, teacher: Named | None) -> dict[str, Any]:
    """Return what decides what a cache says, as JSON gives it back; without a teacher, of its server."""
    whole = asdict(config)
    shown = {name: value for name, value in whole["data"].items() if name not in FREE}
    views = load_views(config.data, config.student.gist)
    answers = {name: whole["answers"][name] for name in ("by", "count", "tokens", "sampling", "stop", "only", "seed")}
    served = {"teacher": config.teacher_server.name}
    return _listed(
        {
            **(served if teacher is None else _named(teacher, config.seed)),
            "tokenizer": tokenizer.sha256,
            "chat_template": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
            "data": shown,
            "views": hashlib.sha256(repr(views).encode()).hexdigest(),
            "answers": answers if config.answers.by == "teacher" else {"by": "data"},
        }
    )


def _named(teacher: Named, seed: int) -> dict[str, Any]:
    return {"teacher": teacher.identity(seed), "teacher_dtype": teacher.model.dtype}


def _listed(value: Any) -> Any:
    """Return a tree with lists in the place of tuples, as JSON has them."""
    if isinstance(value, dict):
        return {name: _listed(inner) for name, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def opened(config: Config, tokenizer: data.Tokenizer, teacher: Named | None) -> data.Cache:
    """Return the cache that a config names, checked to be of the same teacher, tokens, data and temperature.

    Raises:
        UserError: naming what differs, on both sides.
    """
    cache = data.open_cache(Path(config.cache))
    manifest = cache.manifest
    different = differences_of(manifest["settings"], settings_of(config, tokenizer, teacher))
    if different:
        raise UserError(
            f"{config.cache} is not of this run: the cache's -> the run's: {'; '.join(different[:4])}; change the "
            "config back, or label anew"
        )
    told = manifest["kept"]["train"]
    if told["kind"] != "hidden" and (wanted := temperature_of(config)) != told["temperature"]:
        raise UserError(
            f"{config.cache} holds what the teacher says at temperature {told['temperature']:g}, which cannot be "
            f"re-tempered, but objective.temperature is {wanted:g}; use {told['temperature']:g}, or label anew"
        )
    return cache
