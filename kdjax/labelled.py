"""What decides a cache of what a teacher says, and what it must agree on with a run that reads it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from kdjax import data
from kdjax.config import Config
from kdjax.data.views import load_views
from kdjax.errors import UserError
from kdjax.fields import differences_of
from kdjax.job import Job
from kdjax.losses.chunk import check_terms
from kdjax.losses.schedules import ends
from kdjax.named import Named
from kdjax.remote import PICKS
from kdjax.shapes import Sampled, TopK
from kdjax.teacher import LabelConfig

FREE = ("max_shards", "max_bad_rows", "seed")
"""Of `DataConfig`: does not change what an example says. The seed is that of the rows' order, which a cache fixes."""
HELD_OUT = LabelConfig(kind="hidden", bits=16)
"""Of held-out rows the hidden states are kept whatever the kind, so that evaluation is against the whole teacher; a
server has none to give, and they are kept as the others are."""


def _temperature_of(config: Config) -> float:
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


def check(config: Config) -> None:
    """Check, before any model is read, that a cache can be of a config.

    Raises:
        UserError: it has no teacher, several, or an objective that could not be had of such a cache.
    """
    if config.teacher is None and not config.teacher_server.source:
        raise UserError("there is nothing to label: the config has no teacher; name one")
    if config.co_teachers:
        raise UserError("a cache is of one teacher, but co_teachers is set; label each alone")
    if config.mesh.placement == "pmap" or config.teacher_mesh.devices:
        raise UserError(
            "labelling runs the teacher alone, placed by jit; set mesh.placement to jit and teacher_mesh.devices to 0"
        )
    if config.data.teacher_tokenizer:
        raise UserError("a cache is of the student's tokens, but data.teacher_tokenizer is set; leave it out")
    if not config.objective.logits:
        raise UserError("objective.logits is False, so that nothing of what is labelled would be read; set it to True")
    if config.teacher_server.source:
        _check_served(config)
    kinds = {"topk": TopK, "sampled": Sampled}
    if kind := kinds.get(config.label.kind):
        check_terms(config.objective, kind, _temperature_of(config), {})


def _check_served(config: Config) -> None:
    """Check that what a server tells is all that is wanted of it."""
    name, told = config.teacher_server.name, "tells log-probabilities of the likeliest entries, at temperature 1"
    if config.label.kind != "topk":
        raise UserError(f"label.kind is {config.label.kind!r}, but {name} {told}; set it to topk")
    if (temperature := _temperature_of(config)) != 1:
        raise UserError(f"the objective compares at temperature {temperature:g}, but {name} {told}; set it to 1")
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes were started, but one asks {name}; label with one")


def _settings_of(config: Config, tokenizer: data.Tokenizer, teacher: Named | None) -> dict[str, Any]:
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


def wanted_of(job: Job) -> dict[str, Any]:
    """Return all that decides a cache's bytes, as JSON gives it back."""
    config = job.config
    whole: dict[str, Any] = {
        "settings": _settings_of(config, job.tokenizer, job.teacher),
        "order": job.data.identity,
        "kept": _kept_of(config),
        "batch_size": config.batch_size,
        "batches": config.label.batches or config.steps,
        "shard_batches": max(1, config.label.shard_rows // config.batch_size),
        "draws": config.label.seed,
        "parts": job.place.reading[1],
    }
    return json.loads(json.dumps(whole))


def _kept_of(config: Config) -> dict[str, dict[str, Any]]:
    """Return of each split what is kept, and how."""
    temperature = 1.0 if config.label.kind == "hidden" else _temperature_of(config)
    found = {"train": (config.label, temperature), "held_out": (HELD_OUT, 1.0)}
    if config.teacher_server.source:
        found = dict.fromkeys(found, (replace(config.label, picks=config.label.picks or PICKS), temperature))
    return {
        split: {"kind": how.kind, "picks": how.entries, "bits": how.kept_bits, "temperature": at}
        for split, (how, at) in found.items()
    }


def opened(config: Config, tokenizer: data.Tokenizer, teacher: Named | None) -> data.Cache:
    """Return the cache that a config names, checked to be of the same teacher, tokens, data and temperature.

    Raises:
        UserError: naming what differs, on both sides.
    """
    cache = data.open_cache(Path(config.cache))
    manifest = cache.manifest
    different = differences_of(manifest["settings"], _settings_of(config, tokenizer, teacher))
    if different:
        raise UserError(
            f"{config.cache} is not of this run: the cache's -> the run's: {'; '.join(different[:4])}; change the "
            "config back, or label anew"
        )
    told = manifest["kept"]["train"]
    if told["kind"] != "hidden" and (wanted := _temperature_of(config)) != told["temperature"]:
        raise UserError(
            f"{config.cache} holds what the teacher says at temperature {told['temperature']:g}, which cannot be "
            f"re-tempered, but objective.temperature is {wanted:g}; use {told['temperature']:g}, or label anew"
        )
    return cache
