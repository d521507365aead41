"""The very step that `kdjax train` runs, with shapes in the place of arrays: no weight is read, no data opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.build import check_context, places, recipe
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.job import Job
from kdjax.models import LazyTensor, Model, ModelConfig, ModelFile, open_model
from kdjax.models.known import known_architecture
from kdjax.models.lora import is_trained, part
from kdjax.models.paths import nested, parameter_paths
from kdjax.models.quantize import quantized, quantized_axes
from kdjax.named import Named, is_offloaded, models
from kdjax.shapes import Batch, Spans, View
from kdjax.sharding import ON_HOST, Placement


def unread(source: str) -> ModelFile:
    """Return a model whose architecture is known, its tensors being shapes; opened on disk only if it is not."""
    known = known_architecture(source)
    if known is None:
        return open_model(source)
    return ModelFile(known, _lazy(known), source, None)


def abstract_job(config: Config, devices: Sequence[Any], opened: Callable[[str], ModelFile] = unread) -> Job:
    """Return the job of a config on devices that need not be here; it has neither tokenizer nor data.

    Args:
        config: of a run.
        devices: as many as it is to run on.
        opened: how a model is opened; with `open_model` its weights can be read.

    Raises:
        UserError: whatever of the config cannot be, on so many devices.
    """
    place, teacher_place = places(config, devices)
    if config.cache:
        raise UserError("cache is set; a plan is of a teacher that is run: leave it out, as --cache ''")
    if config.teacher_server.source:
        raise UserError("teacher_server is set; a plan is of a teacher that is run: leave it out")
    if config.co_teachers:
        raise UserError("co_teachers is set, but a plan is of one teacher: leave them out, and add theirs by hand")
    if config.student.soft_prompt.tokens < 0:
        raise UserError("student.soft_prompt.tokens is -1, which a tokenizer would count; give a number to plan with")
    student, teacher = models(config, place, teacher_place, opened)
    check_context(config, place, {"student": student})
    check_context(config, teacher_place, {"teacher": teacher})
    student_of_U = None
    if config.data.teacher_tokenizer and teacher is not None:
        student_of_U = np.zeros(teacher.model.config.vocab_size, np.int32)
    made = recipe(config, place, student, teacher, 1.0 if teacher_place is not place else None, student_of_U)
    no_tokenizer, no_data = cast(Any, None), cast(Any, SimpleNamespace(shared=()))
    return Job(config, place, teacher_place, student, teacher, no_tokenizer, no_data, made)


def _lazy(config: ModelConfig) -> dict[str, Any]:
    def refuse(index: Any) -> Any:
        raise RuntimeError("planning reads no weight")

    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    return jax.tree.map(lambda x: LazyTensor(x.shape, refuse), shapes)


def abstract_frozen(job: Job) -> dict[str, Any]:
    """Return shapes, dtypes and places of what `Job.frozen` gives; the teacher reads its whole view in each row."""
    frozen = {} if job.teacher is None else {"teacher": _loaded(job.teacher, job.teacher_place)}
    if job.apart and job.teacher is not None:
        frozen["teacher_head"] = job.teacher.model.head_part(_loaded(job.teacher, job.place))
    if job.student.is_whole:
        return frozen
    whole = _loaded(job.student, job.place)
    return frozen | {"student": part(whole, partial(is_trained, job.student.spec))[1]}


def _loaded(named: Named, place: Placement) -> Any:
    """Return a model's parameters as `Named.params` would, in the compute dtype."""
    tree = _on_devices(named, place)
    if not named.spec.offload:
        return tree
    host = {path for path, axes in parameter_paths(named.model.logical_axes()).items() if is_offloaded(path, axes)}

    def on_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(ON_HOST))

    leaves = parameter_paths(tree).items()
    return nested({path: jax.tree.map(on_host, leaf) if path in host else leaf for path, leaf in leaves})


def _on_devices(named: Named, place: Placement) -> Any:
    if named.file is None:
        shapes = jax.eval_shape(named.model.init, jax.random.key(0))
        where = place.state_shardings(shapes, named.model.logical_axes())
        dtype = jax.numpy.dtype(named.model.dtype)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, where)
    kind, axes = named.spec.quantize, named.model.logical_axes()

    def put(lazy: Any, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        dtype = named.model.dtype if lazy.casts else lazy.dtype
        return jax.ShapeDtypeStruct(lazy.shape, dtype, sharding=place.sharding(names, lazy.shape))

    return jax.tree.map(put, quantized(named.file.tensors, kind), quantized_axes(axes, kind))


def abstract_batch(job: Job) -> Batch:
    """Return shapes, dtypes and places of a batch as training gives it to the step."""
    data = replace(job.config.data, task=job.student.model.config.task)
    rows, lengths = job.config.batch_size, data.lengths

    def array(length: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        if job.place.by == "pmap":
            devices = len(job.place.mesh.devices.flat)
            return jax.ShapeDtypeStruct((devices, rows // devices, length), dtype)
        where = job.place.sharding(("batch", "sequence"), (rows, length))
        return jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)

    def view(name: str) -> View:
        return View(array(lengths[name]), array(lengths[name]), array(lengths[name]))

    student = view("tokens")
    if "inputs" in lengths:
        student = replace(student, encoder=view("inputs"))
    teacher = view("teacher_tokens") if "teacher_tokens" in lengths else None
    row, weight = array(lengths["tokens"]), array(lengths["tokens"], jnp.float32)
    other = array(lengths["teacher_tokens"]) if "teacher_chunk" in lengths else None
    spans = None if other is None else Spans(row, other, other, other)
    return Batch(student, row, row, weight, weight, teacher, None if teacher is None else row, spans=spans)
