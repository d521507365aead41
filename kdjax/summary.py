"""What summary.json says of a run: before it trains and after; the report and the closing table are made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from kdjax import data
from kdjax.environment import describe
from kdjax.evaluate import forward_speed
from kdjax.generate import generate
from kdjax.job import Job
from kdjax.models import Model, byte_count, parameter_count
from kdjax.on_policy import totals
from kdjax.recovery import recovery
from kdjax.shapes import Batch, View
from kdjax.step import TrainState, student_params
from kdjax.student import divergence

Summary = dict[str, Any]
Looks = Mapping[int, Mapping[str, float]]
"""Step -> the figures of its evaluation."""


QUANTIZED = (
    "the teacher takes {bytes_teacher:,} bytes quantised; that costs {kl_quantized:.2g} nats of KL a token from the "
    "whole one, and {agreement_quantized:.1%} of top choices are the same"
)
"""What is said of `quantizing`."""


def opening(job: Job, params: Any, frozen: Any, looks: Looks) -> Summary:
    """Return what is known before the first step, with how each model continues the prompt then."""
    said = _of_teacher_said(job, job.teacher.model, frozen["teacher"]) if job.teacher and job.runs_teacher else {}
    if not job.config.data.teacher_view:
        said["student before"] = _continued(job, job.student.model, student_params(job.recipe, params, frozen))
    return _facts(job, params, frozen, looks) | {"continuations": {who: text for who, text in said.items() if text}}


def _of_teacher_said(job: Job, model: Model, params: Any) -> dict[str, str]:
    """Return how the teacher continues the config's prompt; without and with its own view, where it has one."""
    if not job.config.data.teacher_view:
        return {"teacher": _continued(job, model, params, tokenizer=job.other_tokenizer)}
    return {f"{who} prompt": _continued(job, model, params, who == "with the") for who in ("without the", "with the")}


def quantizing(job: Job, frozen: Any) -> Summary:
    """Return what quantising the teacher costs on held-out text: the KL to it from the whole one, and equal choices.

    Nothing where it is not quantised or gives no logits. The whole teacher is in memory beside it meanwhile.
    """
    teacher, place, batches = job.teacher, job.teacher_place, job.data.evaluation(job.config.batch_size)
    if teacher is None or not job.runs_teacher or teacher.spec.quantize == "none":
        return {}
    if not (job.config.objective.logits and batches):
        return {}
    whole = replace(teacher, spec=replace(teacher.spec, quantize="none"))
    kept: dict[str, Any] = {"teacher": whole.params(place, job.keys[1], whole.model.dtype)}
    if job.data.shared:
        kept["teacher_prefix"] = whole.prefix(place, kept["teacher"], job.data.shared)
        kept["student_prefix"] = frozen["teacher_prefix"]  # it is the quantised teacher that is measured as a student
    figures = divergence(place, teacher, frozen["teacher"], whole, kept, [_of_teacher(batch) for batch in batches])
    return {f"{name}_quantized": figures[name] for name in ("kl", "agreement")}


def _of_teacher(batch: Batch) -> Batch:
    """Return the batch as the teacher sees it."""
    if batch.teacher is None:
        return batch
    return replace(
        batch, student=batch.teacher, student_rows_BR=batch.teacher_rows_BR, teacher=None, teacher_rows_BR=None
    )


def closing(job: Job, state: TrainState, frozen: Any, looks: Looks, rows: Sequence[Mapping[str, Any]]) -> Summary:
    """Return what a run has come to, from its last state and the rows of its metrics."""
    config, look = job.config, looks.get(job.config.steps, {})
    ones_BT = np.ones((config.batch_size, config.data.sequence_length), np.int32)
    view = View(np.zeros_like(ones_BT), ones_BT, np.cumsum(ones_BT, 1, np.int32) - 1)  # the tokens do not matter
    view = replace(view, encoder=view) if job.student.model.config.encoder_layers else view
    rates = sorted(rate for row in rows if np.isfinite(rate := row.get("tokens_per_second", np.nan)))
    student = student_params(job.recipe, state.params, frozen)
    text = _continued(job, job.student.model, student)
    figures = _facts(job, state.params, frozen, looks) | named_figures(look, "after")
    after = "distilled, without it" if config.data.teacher_view else "student after"
    figures |= recovery(job, state.params, frozen) | totals(rows)
    figures |= {
        "continuations": {after: text} if text else {},
        "steps": config.steps,
        "train_tokens": config.steps * ones_BT.size,
        "eval_tokens": look.get("tokens", 0),
        "skipped": int(state.skipped),
        "tokens_per_second_train": rates[len(rates) // 2] if rates else None,
        "tokens_per_second_student": forward_speed(job.student.model, student, view),
        "notes": config.notes,
    }
    if job.teacher is not None and job.runs_teacher:
        speeds = [forward_speed(one.model, frozen[name], view) for name, one in job.teachers.items()]
        figures["tokens_per_second_teacher"] = 1 / sum(1 / speed for speed in speeds)
    return figures


def named_figures(figures: Mapping[str, float], when: str) -> Summary:
    """Return an evaluation's figures under the names of summary.json."""
    own = {
        f"{name}_{when}": figures[name]
        for name in ("kl", "ce", "perplexity", "agreement", "features")
        if name in figures
    }
    return own | {
        f"{name}_teacher": figures[f"teacher_{name}"] for name in ("ce", "perplexity") if f"teacher_{name}" in figures
    }


def _facts(job: Job, params: Any, frozen: Any, looks: Looks) -> Summary:
    facts = {
        "name": job.config.name,
        "student": job.student.name,
        "parameters_student": parameter_count(jax.eval_shape(job.student.model.init, job.keys[0])),
        "parameters_trained": parameter_count(params["student"]),
        "train_documents": job.data.train_documents,
        "held_out_documents": job.data.held_out_documents,
        "held_out_dropped": job.data.held_out_dropped,
        "held_out_sha256": job.data.held_out_hash,
        "prompt": job.config.prompt,
        "environment": describe(),
    }
    if job.teacher is not None:
        counts = [parameter_count(jax.eval_shape(one.model.init, job.keys[1])) for one in job.teachers.values()]
        facts |= {"teacher": " + ".join(one.name for one in job.teachers.values()), "parameters_teacher": sum(counts)}
        facts |= {"bytes_teacher": sum(byte_count(frozen[name]) for name in job.teachers)} if job.runs_teacher else {}
    elif job.config.teacher_server.source:
        facts["teacher"] = job.config.teacher_server.name
    return facts | named_figures(looks.get(0, {}), "before")


def _continued(
    job: Job, model: Model, params: Any, is_teachers_view: bool = False, tokenizer: data.Tokenizer | None = None
) -> str:
    """Return the greedy continuation of the config's prompt, empty without one; None: by the student's tokenizer."""
    if not job.config.prompt:
        return ""
    tokenizer = tokenizer or job.tokenizer
    is_input, end = model.config.encoder_layers > 0, tokenizer.eos_ids
    if job.config.data.has_views:
        shown = job.config.prompt, job.config.data, tokenizer, job.config.student.gist
        prompts = [data.encode_prompt(*shown)[is_teachers_view]]
    else:
        prompts = [tokenizer.encode_prompt(job.config.prompt, is_input=is_input)]
    new = generate(model, params, prompts, max_new_tokens=job.config.prompt_tokens, eos_ids=end)[0]
    return tokenizer.decode(new)
