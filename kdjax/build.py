"""From a config to what a job computes with: models, data, the step's recipe, and where all of it lies.

Every check that needs no training is made here, before the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from kdjax import data, optim
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.job import Job
from kdjax.labelled import opened
from kdjax.losses import ObjectiveConfig
from kdjax.losses.features import Sizes, init_projections, projections, resolved, tapped
from kdjax.losses.schedules import ends
from kdjax.models import Model
from kdjax.named import Named, co_teachers, models, prompted
from kdjax.sharding import Placement, placements
from kdjax.step import Recipe
from kdjax.teacher import brought, live_teacher, mixed, no_teacher, other_teacher
from kdjax.teachers import shares, why_one_tokenizer

log = logging.getLogger(__name__)


def build(config: Config, text: data.DataConfig | None = None) -> Job:
    """Return the job of a config, all that can be checked beforehand checked.

    Args:
        config: the run's.
        text: what is trained on, where that is not `config.data` itself but answers to it.

    Raises:
        UserError: whatever of the config cannot be.
    """
    _check_own_samples(config)
    place, teacher_place = places(config)
    _check_drawing(config, teacher_place is not place)
    student, teacher = models(config, place, teacher_place)
    others = co_teachers(config, place, student)
    shares_SK = teacher_shares(config)
    _check_length(config, {"student": student, "teacher": teacher, **others})
    task = _task(config, {"student": student, "teacher": teacher, **others})
    check_context(config, place, {"student": student, **others})
    check_context(config, teacher_place, {"teacher": teacher})
    tokenizer = tokenizer_of(config, student, teacher, *others.values())
    data.check_fits(tokenizer, student.model.config.vocab_size)
    other = other_tokenizer(config, tokenizer, teacher)
    student = prompted(student, tokenizer, student.model.config.max_positions - config.data.sequence_length)
    for name in config.answers.unrelated if config.data.teacher_view else ():
        data.check_text(name, "answers.unrelated")
    if config.prompt and config.data.has_views:
        data.encode_prompt(config.prompt, config.data, tokenizer, config.student.gist)
    process_index, process_count = place.reading
    if config.cache:
        cache = opened(config, tokenizer, teacher)
        own = {"batch_size": config.batch_size, "process_index": process_index, "process_count": process_count}
        loader = data.cached(cache, config.data.seed, **own)
        made = recipe(config, place, student, teacher, brings=cache.manifest["kept"]["train"]["temperature"])
        return Job(config, place, teacher_place, student, teacher, tokenizer, loader, made)
    loader = data.build(
        replace(text or config.data, task=task, share_prefix=_shares(config, teacher)),
        tokenizer,
        batch_size=config.batch_size,
        process_index=process_index,
        process_count=process_count,
        start_token=student.model.config.start_token,
        labels=student.model.config.labels,
        room=config.answers.tokens if config.answers.student_share else 0,
        gist=config.student.gist,
        tells_source=len(shares_SK) > 1,
        teacher_tokenizer=other,
    )
    _check_length(config, {"teacher": teacher}, len(loader.shared))
    student_of_U = None
    if other is not None and teacher is not None:
        student_of_U = data.student_of(tokenizer, other, teacher.model.config.vocab_size)
    made = recipe(config, place, student, teacher, None if teacher_place is place else 1.0, student_of_U)
    if others:
        live = [made.signal_of, *(live_teacher(one.model, name=name) for name, one in others.items())]
        made = replace(made, signal_of=mixed(live, shares_SK))
    return Job(config, place, teacher_place, student, teacher, tokenizer, loader, made, others, other)


def places(config: Config, devices: Sequence[Any] | None = None) -> tuple[Placement, Placement]:
    """Return where student and teacher lie.

    Raises:
        UserError: meshes that cannot be, or over which a batch does not split.
    """
    found = placements(config.mesh, config.teacher_mesh, devices)
    for place in found:
        place.check_batch(config.batch_size, config.microbatches)
    return found


def _check_own_samples(config: Config) -> None:
    """Check that what is right in the mean over the student's own tokens is asked of these, drawn as it says."""
    how = config.answers.sampling
    for term in config.objective.all_terms:
        if not term.weighed_by_samples:
            continue
        if term.of_own_samples and config.answers.student_share < 1:
            raise UserError(
                f"{term.chosen.name} is right only for what the student says itself, but answers.student_share is "
                f"{config.answers.student_share:g}; set it to 1, or take reverse_kl, which is right for any text"
            )
        if ends(term.temperature, "temperature") != (how.temperature,) * 2 or how.top_k or how.top_p < 1 or how.min_p:
            raise UserError(
                f"{term.chosen.name} at temperature {term.temperature} wants tokens drawn at that temperature from the "
                f"whole vocabulary, but answers.sampling is {how}; give both one temperature, without top_k, top_p or "
                "min_p"
            )


def _check_drawing(config: Config, apart: bool) -> None:
    """Check that answers can be drawn as the config says."""
    own = config.answers
    if own.teacher_share and (config.teacher is None or config.co_teachers or apart):
        raise UserError(
            f"answers.teacher_share is {own.teacher_share:g}, which wants one teacher where the student lies; leave "
            "out co_teachers and teacher_mesh.devices, or set it to 0"
        )
    weighs = any(term.weighed_by_samples for term in config.objective.all_terms)
    if config.mesh.placement == "pmap" and weighs and (own.teacher_share or own.reuse > 1):
        raise UserError(
            "tokens that weigh by how likely they were when they were drawn want mesh.placement jit; set that, or "
            "answers.teacher_share to 0 and answers.reuse to 1"
        )


def teacher_shares(config: Config) -> np.ndarray:
    """Return what each teacher weighs, by the source of an example: `kdjax.teachers.shares`.

    Raises:
        UserError: as that does.
    """
    every = config.co_teachers
    weights, sources = [config.teacher_weight], [config.teacher_sources]
    weights, sources = [*weights, *(one.weight for one in every)], [*sources, *(one.sources for one in every)]
    return shares(weights, sources, len(config.data.sources))


def _shares(config: Config, teacher: Named | None) -> bool:
    """Return whether the teacher reads what its views share once: said, where it cannot."""
    why = "" if teacher is None else teacher.model.config.why_no_prefix
    why = why or ("it changes with the student" if config.teacher_follows != "nothing" else "")
    if why and config.data.teacher_view and config.data.share_prefix:
        log.info("the teacher reads its whole view in each row: %s", why)
    return config.data.share_prefix and not why


def _task(config: Config, models: dict[str, Named | None]) -> Any:
    """Return what of an example is predicted, by the student and its teachers.

    Raises:
        UserError: the models are made for other tasks, or have no logits to compare.
    """
    student: Any = models["student"]
    task = student.model.config.task if config.data.task == "auto" else config.data.task
    for who, named in models.items():
        made_for = task if named is None else named.model.config.task
        if made_for != task and (task, made_for) != ("embedding", "masked_lm"):
            raise UserError(
                f"the {who} is made for {made_for} but the data is to be that of {task}; wanted models of one kind, "
                "and data.task auto or that kind"
            )
    if config.data.has_views and task != "causal_lm":
        raise UserError(f"data's views are for causal_lm, but the student is made for {task}; leave them out")
    if config.answers.student_share and (not config.data.has_views or jax.process_count() > 1):
        raise UserError(
            "answers.student_share wants prompts, and one process: set data.student_view ('{{ prompt }}' is the bare "
            "prompt), and run it in one process, or set answers.student_share to 0"
        )
    if config.data.teacher_view and models["teacher"] is None and not config.teacher_server.source:
        raise UserError("data.teacher_view is set, but the config has no teacher; name one, or set data.student_view")
    if task == "embedding" and config.objective.logits:
        raise UserError(
            "an encoder without a head has no logits; set objective.logits to False, and name what to compare of its "
            "layers in objective.features"
        )
    if config.prompt and not student.model.config.causal:
        raise UserError(f"prompt is {config.prompt!r}, but an encoder continues no text; leave it empty")
    return task


def _check_length(config: Config, models: dict[str, Named | None], shared: int = 0) -> None:
    """Check that rows are no longer than the models were made for, the teacher's behind so many shared tokens."""
    own = config.data.teacher_length if config.data.has_teacher_rows else 0
    for who, named in models.items():
        setting = "teacher_length" if own and who == "teacher" else "sequence_length"
        length = getattr(config.data, setting)
        before = shared if who == "teacher" else 0
        if named is not None and before + length > named.model.config.max_positions:
            behind = f", behind {before} tokens that all its views begin with," if before else ""
            raise UserError(
                f"data.{setting} is {length}{behind} but the {who} was made for {named.model.config.max_positions} "
                "positions at most; lower it"
            )


def check_context(config: Config, place: Placement, models: dict[str, Named | None]) -> None:
    """Check that rows and heads split over the devices that share a row."""
    names = ("sequence_length", "teacher_length", "target_length")
    lengths = {f"data.{name}": length for name in names if (length := getattr(config.data, name))}
    place.check_context(lengths, {who: named.model.config.heads for who, named in models.items() if named is not None})


def recipe(
    config: Config,
    place: Placement,
    student: Named,
    teacher: Named | None,
    brings: float | None = None,
    student_of_U: Any = None,
) -> Recipe:
    """Return what the step is made of.

    Args:
        config: the run's.
        place: where the student lies.
        student: the model that is trained.
        teacher: the one that teaches; none where nobody does, or a server has.
        brings: the temperature of what a teacher says, where batches bring that.
        student_of_U: of a teacher with another tokenizer which of the student's entries each of its own counts as.
    """
    objective, widths = _with_features(config.objective, student, teacher)
    params = jax.eval_shape(
        lambda key: {"student": student.init(key), "projections": init_projections(widths, key)},
        jax.random.key(0),
    )
    model: Any = None if teacher is None else teacher.model
    live = no_teacher if teacher is None else live_teacher(model, tapped(objective.features, 1))
    live = live if student_of_U is None else other_teacher(model, student_of_U, objective, place.shard_loss)
    return Recipe(
        model=student.model,
        objective=objective,
        optimizer=optim.optimizer(config.optim, config.steps, params),
        signal_of=live if brings is None else brought(model, brings),
        steps=config.steps,
        microbatches=config.microbatches,
        seed=config.seed,
        shard=place.shard_loss,
        axis_name=place.axis_name,
        projections=widths,
        adapter_scale=student.adapter_scale,
        teacher_follows=config.teacher_follows,
        average_decay=config.average_decay,
        clip_ratio=config.answers.clip_ratio,
    )


def _with_features(objective: ObjectiveConfig, student: Named, teacher: Named | None):
    """Return the objective with each feature's layers filled in, and the widths of the projections that they need."""
    if not objective.features:
        return objective, {}
    if teacher is None:
        raise UserError("objective.features compares inner layers with a teacher's, but the config has no teacher")
    sizes = _sizes(student.model), _sizes(teacher.model)
    features = tuple(resolved(feature, *sizes) for feature in objective.features)
    return replace(objective, features=features), projections(features, *sizes)


def _sizes(model: Model) -> Sizes:
    c = model.config
    kv_width = c.kv_heads * c.head_width
    widths = {"hidden": c.width, "q": c.heads * c.head_width, "k": kv_width, "v": kv_width}
    return Sizes(c.layers, c.kv_heads, widths, c.causal)


def other_tokenizer(config: Config, tokenizer: data.Tokenizer, teacher: Named | None) -> data.Tokenizer | None:
    """Return the tokenizer of a teacher that has another one than the student; None where they share one.

    Raises:
        UserError: there is none, it is the student's, or the config has something that wants one tokenizer.
    """
    own = config.data.teacher_tokenizer
    if own and (why := why_one_tokenizer(config)):
        raise UserError(f"data.teacher_tokenizer is {own!r}, but {why}; leave one of both out")
    if teacher is None or not own:
        if any(term.is_across for term in config.objective.all_terms):
            raise UserError("uld and alm are of a teacher with another tokenizer; set data.teacher_tokenizer")
        return None
    path = own if own != "own" else teacher.file and teacher.file.tokenizer
    if path is None:
        raise UserError("data.teacher_tokenizer is 'own', but the teacher brings none; name a tokenizer.json")
    found = data.load_tokenizer(path)
    data.check_fits(found, teacher.model.config.vocab_size)
    if found.sha256 == tokenizer.sha256:
        raise UserError("data.teacher_tokenizer is the student's tokenizer too; leave it out, to compare every token")
    return found


def tokenizer_of(config: Config, student: Named, *teachers: Named | None) -> data.Tokenizer:
    """Return the configured tokenizer, or the one that comes with a model, with the configured chat template.

    Raises:
        UserError: none, or two that differ.
    """
    models = (student,) if config.data.teacher_tokenizer else (*teachers, student)
    paths = [m.file.tokenizer for m in models if m is not None and m.file is not None and m.file.tokenizer]
    found = [data.load_tokenizer(path) for path in dict.fromkeys(paths)]
    if len({tokenizer.sha256 for tokenizer in found}) > 1:
        raise UserError(
            f"student and teacher have different tokenizers ({', '.join(map(str, reversed(paths)))}): their "
            "probabilities are of different tokens; use models that share one, or set data.teacher_tokenizer to own"
        )
    if config.data.tokenizer:
        found = [data.load_tokenizer(config.data.tokenizer)]
    if not found:
        raise UserError("no model brings a tokenizer; set data.tokenizer to 'bytes' or to a tokenizer.json")
    return data.with_template(found[0], config.data.chat_template)
