"""Which teachers a config may have: one, several (who speaks to which example), one in a cache or behind a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdjax.errors import UserError
from kdjax.models.config import ModelSpec


@dataclass(frozen=True)
class CoTeacher:
    """A teacher beside the first: what all say of a token is mixed, Σ_k w_k·p_k, by their shares of the weight."""

    model: ModelSpec
    weight: float = 1.0
    sources: tuple[int, ...] = ()
    """Which of data.sources, counted from 0, it speaks to the examples of; empty is all."""


def why_one(config: Any) -> str:
    """Return why the teacher of a config can have none beside it; empty where it can."""
    others = config.co_teachers
    chosen = bool(config.teacher_sources) or any(one.sources for one in others)
    reasons = {
        "the config has no teacher that they stand beside": config.teacher is None,
        "one of them is 'teacher', which is no model": any(one.model.source == "teacher" for one in others),
        "teacher_follows has the student's own past teach": config.teacher_follows != "nothing",
        "a cache is of one teacher": bool(config.cache),
        "teacher_mesh.devices gives one teacher a mesh of its own": bool(config.teacher_mesh.devices),
        "objective.features compares with the inner layers of one": bool(config.objective.features),
        "data.teacher_view is what one teacher sees": bool(config.data.teacher_view or config.prompt_file),
        "answers.by has one teacher answer": config.answers.by == "teacher",
        "answers.student_share forgets whose source a row is": chosen and config.answers.student_share > 0,
    }
    return next((why for why, holds in reasons.items() if holds), "")


def why_one_tokenizer(config: Any) -> str:
    """Return why student and teacher of a config must have one tokenizer; empty where they may have two."""
    reasons = {
        "student.source is 'teacher', so that they share one": config.student.source == "teacher",
        "co_teachers are mixed token by token": bool(config.co_teachers),
        "a cache is of the student's tokens": bool(config.cache),
        "teacher_mesh.devices is for a teacher with the student's tokens": bool(config.teacher_mesh.devices),
        "mesh.tensor spreads one vocabulary": config.mesh.tensor > 1,
        "objective.features compares the layers at the same tokens": bool(config.objective.features),
        "answers.student_share puts the student's tokens before the teacher": config.answers.student_share > 0,
        "teacher_server is asked in the student's tokens": bool(config.teacher_server.source),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def why_no_cache(config: Any) -> str:
    """Return why what a teacher says cannot come from a cache; empty where it can."""
    nobody = config.teacher is None and not config.teacher_server.source
    reasons = {
        "the config has no teacher whose cache it could be": nobody,
        "teacher_follows makes the teacher another one at every step": config.teacher_follows != "nothing",
        "answers.student_share has the teacher read what the student says": config.answers.student_share > 0,
        "teacher_mesh.devices is for a teacher that is run": bool(config.teacher_mesh.devices),
        "objective.features compares inner layers, of which it has none": bool(config.objective.features),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def why_no_server(config: Any) -> str:
    """Return why a server cannot speak in the place of a config's teacher; empty where it can."""
    reasons = {
        "the config has a teacher": config.teacher is not None,
        "student.source is 'teacher', whose weights a server does not give": config.student.source == "teacher",
        "answers.student_share has the teacher read what the student says": config.answers.student_share > 0,
        "objective.features compares inner layers, of which it tells nothing": bool(config.objective.features),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def check_is_run(config: Any) -> None:
    """Check that a teacher which training needs is run in it, or has spoken into a cache.

    Raises:
        UserError: it is behind a server, which no step asks.
    """
    if config.teacher_server.source and not config.cache and config.objective.needs_teacher:
        raise UserError(
            "teacher_server is asked before training, not by its steps: run `kdjax label CONFIG OUT`, and train with "
            "--cache OUT; or learn from its answers alone, with --answers.by teacher --objective.alpha 1"
        )


def shares(weights: Sequence[float], sources: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Return shares_SK, float32: of each teacher, what it weighs for the examples of each source; a row's sum is 1.

    Where no teacher chooses its sources there is one row, which is that of all.

    Args:
        weights: of each teacher.
        sources: of each teacher those that it speaks to; empty is all.
        count: how many sources the data has.

    Raises:
        UserError: a weight that is not above 0, a source that is not there, or one that nobody speaks to.
    """
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise UserError(f"the teachers' weights are {', '.join(f'{w:g}' for w in weights)}; wanted each above 0")
    for of_one in sources:
        if strange := [source for source in of_one if not 0 <= source < count]:
            raise UserError(
                f"a teacher's sources are {list(of_one)}, but data.sources has {count} entries, counted from 0: "
                f"leave out {strange[0]}"
            )
    rows = count if any(sources) else 1
    speaks_SK = np.array([[not of_one or source in of_one for of_one in sources] for source in range(rows)])
    found_SK = np.where(speaks_SK, np.asarray(weights, np.float64), 0)
    if len(silent := np.flatnonzero(found_SK.sum(1) == 0)):
        raise UserError(
            f"no teacher speaks to the examples of data.sources[{silent[0]}]; give it to one of them, by "
            "teacher_sources or a co-teacher's sources"
        )
    return (found_SK / found_SK.sum(1, keepdims=True)).astype(np.float32)
