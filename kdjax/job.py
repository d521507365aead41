"""What training and evaluation share: models and data, where they lie, and the placed functions that are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import data, optim
from kdjax.config import Config
from kdjax.evaluate import sums_of
from kdjax.losses.features import tapped
from kdjax.named import Named
from kdjax.shapes import Batch
from kdjax.sharding import Placement
from kdjax.step import Recipe, TrainState, init_state, likely, step
from kdjax.teacher import no_teacher, speaking


@dataclass(frozen=True)
class Job:
    """All that training and evaluation share; nothing in it changes.

    Attributes:
        place: where the student lies, and the step runs.
        teacher_place: where the teacher lies: there too, unless it has a mesh of its own.
        other_tokenizer: the teacher's, where that is not the student's.
    """

    config: Config
    place: Placement
    teacher_place: Placement
    student: Named
    teacher: Named | None
    tokenizer: data.Tokenizer
    data: data.Data
    recipe: Recipe
    co_teachers: Mapping[str, Named] = field(default_factory=dict)
    other_tokenizer: data.Tokenizer | None = None

    @property
    def keys(self) -> tuple[jax.Array, jax.Array]:
        """Keys of the random parameters of student and teacher: never the same, or a student would start perfect."""
        student, teacher = jax.random.split(jax.random.key(self.config.seed))
        return student, teacher

    @property
    def teachers(self) -> dict[str, Named]:
        """The teacher and those beside it, by the names of their frozen trees."""
        return {} if self.teacher is None else {"teacher": self.teacher, **self.co_teachers}

    @property
    def apart(self) -> bool:
        """Whether the teacher has a mesh of its own, so that what it says of a batch is brought to the student's."""
        return self.teacher is not None and self.teacher_place is not self.place

    @property
    def runs_teacher(self) -> bool:
        """Whether there is a teacher that is run: not where a cache has what it says."""
        return self.teacher is not None and not self.config.cache

    @property
    def devices(self) -> list[Any]:
        """All devices, those of the teacher too."""
        return list(dict.fromkeys([*self.place.mesh.devices.flat, *self.teacher_place.mesh.devices.flat]))

    def frozen(self) -> dict[str, Any]:
        """Return the trees that are used but not trained, in their compute dtype: the teacher, the student's base."""
        frozen = self.frozen_teacher()
        if not self.student.is_whole:
            teacher = self.teacher if self.runs_teacher and not self.apart else None
            is_teacher = teacher is not None and self.student.shares(teacher)
            frozen["student"] = self.student.base(self.place, frozen["teacher"] if is_teacher else None)
        return frozen

    def frozen_teacher(self) -> dict[str, Any]:
        """Return the frozen trees but the student's: the teacher, and what all its views begin with if it is shared.

        Of a teacher apart also what its head is made of, where the student lies; of one in a cache that alone.
        """
        if self.teacher is None:
            return {}
        key, dtype = self.keys[1], self.teacher.model.dtype
        if not self.runs_teacher:
            return {"teacher_head": self.teacher.params(self.place, key, dtype, self.teacher.model.head_part)}
        frozen = {"teacher": (params := self.teacher.params(self.teacher_place, key, dtype))}
        for number, (name, other) in enumerate(self.co_teachers.items()):
            frozen[name] = other.params(self.place, jax.random.fold_in(key, number), other.model.dtype)
        if self.data.shared:
            frozen["teacher_prefix"] = self.teacher.prefix(self.teacher_place, params, self.data.shared)
        if self.apart:
            frozen["teacher_head"] = self.teacher.params(self.place, key, dtype, self.teacher.model.head_part)
        return frozen

    def given(self, frozen: dict[str, Any], batch: Batch, *, trains: bool = False) -> tuple[dict[str, Any], Batch]:
        """Return what `sums`, or the step where it `trains`, take of the frozen trees and of this process's rows.

        A teacher apart begins to work on the batch, and what it says comes with it. Nothing here waits for it: while
        the student's devices still take a step, the teacher's are at the next batch.
        """
        placed = self.place.put_batch(batch)
        if not self.apart:
            return frozen, placed
        if trains and not self.recipe.objective.needs_teacher:
            return of_step(frozen), placed
        said = self.speak(of_teacher(frozen), self.teacher_place.put_batch(batch))
        return of_step(frozen), replace(placed, signal=self.place.take_rows(said))

    def frozen_names(self) -> dict[str, str]:
        """Return the identity of each frozen tree."""
        names = {name: one.identity(self.config.seed) for name, one in self.teachers.items()}
        return names if self.student.is_whole else names | {"student": self.student.identity(self.config.seed)}

    def start(self) -> TrainState:
        """Return the state before the first step."""
        params = self.student.start(self.place, self.keys[0])
        return jax.jit(partial(init_state, self.recipe), out_shardings=self.shardings, donate_argnums=0)(params)

    @cached_property
    def abstract_state(self) -> TrainState:
        """The state's shapes, dtypes and places."""
        shapes = jax.eval_shape(lambda key: init_state(self.recipe, self.student.init(key)), self.keys[0])
        where = self.place.state_shardings(shapes, {"student": self.student.axes})
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)

    @property
    def shardings(self) -> Any:
        """The state's places."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    @cached_property
    def speak(self) -> Callable[..., Any]:
        """What a teacher apart runs on its devices, placed: ``speak(of_teacher(frozen), batch)``."""
        model: Any = None if self.teacher is None else self.teacher.model
        layers = tapped(self.recipe.objective.features, 1)
        return self.teacher_place.compile_rows(speaking(model, layers, self.config.microbatches))

    @cached_property
    def step(self) -> Callable[..., Any]:
        """The placed ``step(state, frozen, batch) -> (state, metrics)``."""
        # With alpha 1 and no inner layers to compare the teacher only measures: training does not run it.
        alone = self.recipe if self.recipe.objective.needs_teacher else replace(self.recipe, signal_of=no_teacher)
        return self.place.compile_step(partial(step, recipe=alone), self.shardings)

    def lowered(self, state: Any, frozen: dict[str, Any], batch: Batch) -> list[Any]:
        """Return the step lowered and, where the teacher is apart, what it runs: for arrays, or shapes with places.

        Args:
            state: the training state.
            frozen: all of what `frozen` gives.
            batch: as it lies on the student's mesh; a signal that it brings is left out of account.
        """
        if not self.apart:
            return [self.step.lower(state, frozen, batch)]

        def rows_on(place: Placement, x: Any) -> jax.ShapeDtypeStruct:
            names = ("batch", *[None] * (x.ndim - 1))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place.sharding(names, x.shape))

        if not self.recipe.objective.needs_teacher:
            return [self.step.lower(state, of_step(frozen), replace(batch, signal=None))]
        theirs = jax.tree.map(partial(rows_on, self.teacher_place), replace(batch, signal=None))
        said = jax.eval_shape(self.speak, of_teacher(frozen), theirs)
        brought = replace(batch, signal=jax.tree.map(partial(rows_on, self.place), said))
        return [self.step.lower(state, of_step(frozen), brought), self.speak.lower(of_teacher(frozen), theirs)]

    @cached_property
    def likely(self) -> Callable[..., Any]:
        """The placed ``likely(params, frozen, batch)`` of answers that student and teacher have drawn."""
        own = self.config.answers
        how = {"temperature": own.sampling.temperature, "teacher_share": own.teacher_share}
        return self.place.compile_rows(partial(likely, recipe=self.recipe, **how))

    @cached_property
    def learning_rates(self) -> np.ndarray:
        """The learning rate of each update."""
        rate = optim.schedule(self.config.optim, self.config.steps)
        return np.asarray(jax.vmap(rate)(jnp.arange(self.config.steps)))

    @cached_property
    def sums(self) -> Callable[..., Any]:
        """The placed ``sums(params, frozen, batch)`` of evaluation."""
        return self.place.compile_sums(partial(sums_of, recipe=self.recipe))


def of_teacher(frozen: dict[str, Any]) -> dict[str, Any]:
    """Return of the frozen trees those that lie where a teacher apart does."""
    return {name: frozen[name] for name in ("teacher", "teacher_prefix") if name in frozen}


def of_step(frozen: dict[str, Any]) -> dict[str, Any]:
    """Return the others, which lie where the student does."""
    return {name: tree for name, tree in frozen.items() if name not in of_teacher(frozen)}
