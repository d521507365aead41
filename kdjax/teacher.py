"""What the teacher says about a batch: one small function a kind of signal, each ``signal_of(frozen, batch)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.models import Model
from kdjax.shapes import Array, Batch, Signal, in_parts

SignalOf = Callable[[Any, Batch], Signal | None]
"""``signal_of(frozen, microbatch)``: called inside the microbatch loop."""


def pick_rows(hidden_BTD: Array, rows_BR: Array) -> Array:
    """Return hidden_ND at the given rows of each example, N = B·R."""
    picked_BRD = jnp.take_along_axis(hidden_BTD, rows_BR[:, :, None], axis=1, mode="promise_in_bounds")
    return picked_BRD.reshape(-1, hidden_BTD.shape[-1])


def no_teacher(frozen: Any, batch: Batch) -> None:
    """Return nothing: pre-training, the cross entropy alone."""
    return None


def live_teacher(model: Model, layers: Mapping[str, tuple[int, ...]] | None = None) -> SignalOf:
    """Return the signal of a teacher that is run on every microbatch; its parameters are ``frozen["teacher"]``.

    What stands before every example that it sees is ``frozen["teacher_prefix"]``, if there is that.

    Args:
        model: the teacher.
        layers: tap -> the layers of it that the signal brings along.
    """
    layers = layers or {}

    def signal_of(frozen: Any, batch: Batch) -> Signal:
        params, prefix = lax.stop_gradient((frozen["teacher"], frozen.get("teacher_prefix")))
        view = batch.student if batch.teacher is None else batch.teacher
        rows_BR = batch.student_rows_BR if batch.teacher_rows_BR is None else batch.teacher_rows_BR
        output = model.apply(params, view, taps=tuple(layers), prefix=prefix)
        taps = {name: jnp.stack([output.taps[name][i] for i in numbers]) for name, numbers in layers.items()}
        hidden_ND, taps = lax.stop_gradient((pick_rows(output.hidden_BTD, rows_BR), taps))
        return Signal(hidden_ND, model.head(params), taps)

    return signal_of


def speaking(
    model: Model, layers: Mapping[str, tuple[int, ...]], microbatches: int
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Return what a teacher on devices of its own runs there: ``speak(frozen, batch)``, of a whole batch.

    It gives what `brought` makes a signal of: hidden states at the compared rows, `hidden_BRD`, and each tap that is
    asked for, by name, [B, layers asked for, T, …].
    """
    signal_of = live_teacher(model, layers)

    def of_some(frozen: Any, batch: Batch) -> dict[str, Array]:
        signal: Any = signal_of(frozen, batch)
        hidden_BRD = signal.hidden_ND.reshape(*batch.student_rows_BR.shape, -1)
        return {"hidden_BRD": hidden_BRD} | {name: jnp.swapaxes(tap, 0, 1) for name, tap in signal.taps.items()}

    def speak(frozen: Any, batch: Batch) -> dict[str, Array]:
        parts = jax.tree.map(lambda x: in_parts(x, microbatches), batch)
        with jax.named_scope("teacher"):
            said = lax.map(lambda some: of_some(frozen, some), parts)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), said)

    return speak


def brought(model: Model) -> SignalOf:
    """Return the signal that a batch brings along, said by `speaking`; of the teacher only its head is wanted here.

    What the head is made of is ``frozen["teacher_head"]`` (`Model.head_part`).
    """

    def signal_of(frozen: Any, batch: Batch) -> Signal:
        said = dict(batch.signal)
        hidden_BRD = said.pop("hidden_BRD")
        taps = {name: jnp.swapaxes(tap, 0, 1) for name, tap in said.items()}
        head = model.head(lax.stop_gradient(frozen["teacher_head"]))
        return Signal(hidden_BRD.reshape(-1, hidden_BRD.shape[-1]), head, taps)

    return signal_of
