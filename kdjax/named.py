"""From what a config says of a model to one that can be loaded: its weights, and which of them are trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import data
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.models import (
    Model,
    ModelFile,
    ModelSpec,
    Prefix,
    attend,
    gist,
    lora,
    open_model,
    prefix_of,
    select_kept,
    soft_prompt,
)
from kdjax.models.paths import nested, parameter_paths
from kdjax.models.quantize import quantized, quantized_axes
from kdjax.sharding import Placement

Open = Callable[[str], ModelFile]
Part = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Named:
    """A model, its weights on disk (None: random ones), and a line that names it.

    Attributes:
        spec: what the config says of it, its source and layers being those of `file`.
        ids: the tokens that its soft prompt starts as, where that is a text.
    """

    model: Model
    file: ModelFile | None
    name: str
    spec: ModelSpec = ModelSpec()
    ids: tuple[int, ...] = ()

    @property
    def is_whole(self) -> bool:
        """All of it is trained, where it is trained."""
        return not (self.spec.trained or self.spec.lora.rank or self.spec.soft_prompt.tokens)

    @property
    def adapter_scale(self) -> float:
        """What adapters add is multiplied by this."""
        return self.spec.lora.alpha / max(self.spec.lora.rank, 1)

    @cached_property
    def axes(self) -> Any:
        """The axes' names of all parameters and adapters."""
        axes = self.model.logical_axes()
        return lora.join(axes, lora.adapter_axes(self.spec.lora, axes))

    def params(self, place: Placement, key: jax.Array, dtype: str = "float32", part: Part = dict) -> Any:
        """Return the parameters, or a `part` of their tree, each read or drawn straight to where it lies."""

        def of(place: Placement, on_host: bool) -> Any:
            some = partial(_lying, on_host=on_host)
            return self._params(place, key, dtype, lambda tree: some(part(tree)))

        if self.spec.offload:
            return lora.join(of(place, False), of(place.on_host, True))
        return self._params(place, key, dtype, part)

    def _params(self, place: Placement, key: jax.Array, dtype: str, part: Part) -> Any:
        kind = self.spec.quantize
        if self.file is not None:
            axes = part(soft_prompt.axes_of(self.model, self.file.tensors))
            return place.load(quantized(part(self.file.tensors), kind), quantized_axes(axes, kind), dtype)

        def init(key: jax.Array) -> Any:
            return jax.tree.map(lambda x: x.astype(dtype), part(self.model.init(key)))

        where = place.state_shardings(jax.eval_shape(init, key), self.model.logical_axes())
        return jax.jit(init, out_shardings=where)(key)

    def prefix(self, place: Placement, params: Any, tokens: Sequence[int]) -> Prefix:
        """Return what stands before every example, computed once, each head's part where the head's parameters lie."""
        of = partial(prefix_of, self.model, tokens=tokens)
        names = (None, None, None, "kv_heads", None)
        where = jax.tree.map(lambda x: place.sharding(names, x.shape), jax.eval_shape(of, params))
        return jax.jit(of, out_shardings=where)(params)

    def init(self, key: jax.Array) -> Any:
        """Return random parameters, only those that are trained, new adapters, and a random soft prompt or gist."""
        params = self.model.init(key)
        return lora.join(self._part(params)[0], self._added(params, key))

    def _added(self, params: Any, key: jax.Array) -> Any:
        adapters = lora.init_adapters(self.spec.lora, params, key)
        adapters |= soft_prompt.init_random(self.spec.soft_prompt, self.model.config, key)
        return adapters | gist.init_random(self.spec.gist, self.model.config, key)

    def start(self, place: Placement, key: jax.Array) -> Any:
        """Return the parameters that are trained before the first step, float32."""
        if self.is_whole and not self.spec.gist:
            return self.params(place, key)
        shapes = jax.eval_shape(self.model.init, key)
        where = place.state_shardings(jax.eval_shape(lambda key: self._added(shapes, key), key), self.axes)
        added = jax.jit(lambda key: self._added(shapes, key), out_shardings=where)(key)
        soft = self.spec.soft_prompt
        if soft.tokens and soft.start != "random":
            ids = self.ids or jax.random.randint(key, (soft.tokens,), 0, self.model.config.vocab_size)
            made = partial(soft_prompt.of_tokens, soft, self.model)
            added |= jax.jit(made, out_shardings=place.replicated)(self.base(place), np.asarray(ids))
        if self.spec.gist and self.file is not None:
            seed = int(jax.random.bits(key, dtype=np.uint32))
            added |= place.load(gist.of_vocabulary(self.spec.gist, self.file, seed), gist.AXES, "float32")
        return lora.join(self._loaded(place, 0, "float32"), added)

    def base(self, place: Placement, whole: Any = None) -> Any:
        """Return the parameters that are not trained, in the compute dtype; out of `whole`, where that is given."""
        return self._loaded(place, 1, self.model.dtype) if whole is None else self._part(whole)[1]

    def shares(self, other: Named) -> bool:
        """Return whether its frozen parameters are the other's: same file and dtype, not quantised, not offloaded."""
        is_plain = other.spec.quantize == "none" and not other.spec.offload
        return self.file is other.file and self.model.dtype == other.model.dtype and is_plain

    def _loaded(self, place: Placement, which: int, dtype: str) -> Any:
        tensors = {} if self.file is None else self.file.tensors  # a random model is trained whole
        return place.load(self._part(tensors)[which], self._part(self.model.logical_axes())[which], dtype)

    def _part(self, tree: Any) -> tuple[Any, Any]:
        return lora.part(tree, lambda path: lora.is_trained(self.spec, path))

    def base_record(self) -> dict[str, Any] | None:
        """Return what a run directory says of the model that the trained part belongs to; None where it is whole."""
        if self.is_whole or self.file is None:
            return None
        path = Path(self.spec.source).expanduser()
        source = str(path.absolute()) if path.exists() else self.spec.source
        return {"spec": asdict(replace(self.spec, source=source)), "sha256": self.file.sha256()}

    def identity(self, seed: int) -> str:
        """Return ``SOURCE HASH``, by which a checkpoint names weights that it does not hold."""
        if self.file is None:
            return f"random seed-{seed}-{self.model.config}"
        digest = self.file.sha256()
        if self.spec.quantize != "none":
            digest = hashlib.sha256(f"{digest} {self.spec.quantize}".encode()).hexdigest()
        return f"{self.file.source} {digest}"


def models(
    config: Config, place: Placement, teacher_place: Placement | None = None, open_file: Open = open_model
) -> tuple[Named, Named | None]:
    """Return student and teacher, which lies where the student does unless it has a place of its own.

    Raises:
        UserError: a model that is not there or does not load, or two vocabularies that differ.
    """
    teacher = None if config.teacher is None else _named(config.teacher, teacher_place or place, open_file, None)
    student = _named(config.student, place, open_file, teacher)
    if teacher is not None:
        _check_pair(student, teacher, bool(config.data.teacher_tokenizer))
    if student.file is not None:
        student.file.check_plain()
    if not student.is_whole or student.spec.gist:
        if student.file is None:
            freeze = "student.lora, student.trained and student.soft_prompt freeze the rest of a model"
            why = "student.gist compresses what a model reads" if student.is_whole else freeze
            raise UserError(f"{why}, but its source is 'random'; name a model")
        lora.check(student.spec, student.file.tensors)
    return student, teacher


def co_teachers(config: Config, place: Placement, student: Named, open_file: Open = open_model) -> dict[str, Named]:
    """Return the teachers beside the first, which lie where the student does, by the names of their frozen trees.

    Raises:
        UserError: as `models` does.
    """
    found = {f"co_teacher_{n}": _named(one.model, place, open_file, None) for n, one in enumerate(config.co_teachers)}
    for one in found.values():
        _check_pair(student, one)
    return found


def _check_pair(student: Named, teacher: Named, is_other: bool = False) -> None:
    """Check that what a teacher says is of what the student predicts; of another vocabulary where it is said so."""
    if not is_other and student.model.config.vocab_size != teacher.model.config.vocab_size:
        sizes = f"{student.model.config.vocab_size} but the teacher's {teacher.model.config.vocab_size}"
        raise UserError(
            f"the student's vocabulary has {sizes} entries; wanted one tokenizer, so equal "
            "sizes; a teacher with another one wants data.teacher_tokenizer"
        )
    if student.model.config.labels != teacher.model.config.labels:
        sizes = f"{student.model.config.labels} classes apart but the teacher {teacher.model.config.labels}"
        raise UserError(f"the student tells {sizes}; wanted the same classes")
    if teacher.file is None and teacher.spec.quantize != "none":
        raise UserError("teacher.quantize is set, but its source is 'random'; name a model")


def is_offloaded(path: str, leaf: Any) -> bool:
    """Return whether a parameter of an offloaded model lies in the hosts' memory: a matrix of the layers.

    Vectors do not: a TPU takes no single row out of an array of two dimensions that lies there.
    """
    return path.startswith("layers/") and len(getattr(leaf, "shape", leaf)) > 2


def _lying(params: dict[str, Any], on_host: bool) -> dict[str, Any]:
    """Return those parameters of an offloaded model, or of a tree like them, that lie in the hosts' memory, or not."""
    return nested({path: x for path, x in parameter_paths(params).items() if is_offloaded(path, x) == on_host})


def prompted(student: Named, tokenizer: data.Tokenizer, room: int) -> Named:
    """Return the student with the tokens that its soft prompt starts as, which may say how many it has.

    Raises:
        UserError: a model that takes none, a text of too few tokens, or more tokens than there is `room` for.
    """
    soft = student.spec.soft_prompt
    if student.spec.gist:
        student.model.config.check_gist()
    if not soft.tokens:
        return student
    student.model.config.check_prefix()
    ids = tuple(tokenizer.encode_prompt(soft_prompt.text_of(soft))) if soft.start == "prompt" else ()
    tokens = len(ids) if soft.tokens < 0 else soft.tokens
    if ids and tokens > len(ids):
        raise UserError(
            f"student.soft_prompt.tokens is {tokens} but its text has {len(ids)}; wanted at most as many, or -1"
        )
    if tokens > room:
        raise UserError(
            f"the soft prompt has {tokens} tokens, but data.sequence_length leaves {room} of the student's "
            f"{student.model.config.max_positions} positions; lower one of them"
        )
    return replace(student, spec=replace(student.spec, soft_prompt=replace(soft, tokens=tokens)), ids=ids)


def _named(spec: ModelSpec, place: Placement, open_file: Open, teacher: Named | None) -> Named:
    file, architecture, name = None, spec.architecture, "random"
    if spec.source == "teacher" and teacher is not None:
        file, architecture, name = teacher.file, teacher.model.config, teacher.name
        if file is None:
            raise UserError("student.source is 'teacher' but the teacher is random; give the student an architecture")
    elif spec.source != "random":
        file = open_file(spec.source)
        architecture, name = file.config, spec.source
    for field, title in (("keep_layers", "layers"), ("keep_encoder_layers", "encoder's")):
        if kept := getattr(spec, field):
            if file is None:
                raise UserError(f"{field} cuts layers out of a model, but source is 'random'; set architecture.layers")
            name = f"{name}, {title} {','.join(map(str, kept))}"
    if file is not None:
        file = select_kept(file, spec)
        architecture = file.config
    if spec.source == "teacher" and teacher is not None:
        spec = _of_teacher(spec, teacher.spec)
    across: Any = {"attention": place.attention(attend), "layout": place.constrain, "dispatch": place.dispatch}
    if spec.offload and (architecture.encoder_layers or place.by == "pmap"):
        raise UserError(
            "teacher.offload is for models of one stack, placed by jit; leave it out of encoder-decoders, or set "
            "mesh.placement to jit"
        )
    model = Model(architecture, spec.dtype, spec.remat, **across, offloaded=spec.offload)
    return Named(model, file, name, spec)


def _of_teacher(student: ModelSpec, teacher: ModelSpec) -> ModelSpec:
    """Return a student's spec, its source and layers, which were the teacher's, being those on disk."""

    def kept(of_student: tuple[int, ...], of_teacher: tuple[int, ...]) -> tuple[int, ...]:
        return (
            tuple(of_teacher[layer] for layer in of_student) if of_student and of_teacher else of_student or of_teacher
        )

    return replace(
        student,
        source=teacher.source,
        keep_layers=kept(student.keep_layers, teacher.keep_layers),
        keep_encoder_layers=kept(student.keep_encoder_layers, teacher.keep_encoder_layers),
    )
