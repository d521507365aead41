"""Numbers that change in the course of training, written as text: ``linear(4, 1)`` goes from 4 to 1.

A value depends on the step alone, so that a resumed run goes on exactly.
"""

from __future__ import annotations

import math
import re

import jax.numpy as jnp

from kdjax.errors import UserError, did_you_mean
from kdjax.shapes import Array

Value = float | str
"""A number, or ``SHAPE(START, END)`` with a row of `SHAPES`."""

SHAPES = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - jnp.cos(jnp.pi * progress)) / 2,
}
"""Shape -> how much of the way from start to end is gone, by the share of the run that is."""


def ends(value: Value, name: str) -> tuple[float, float]:
    """Return the value at the first and the last step; between them it never leaves their range.

    Raises:
        UserError: not a finite number or a schedule, naming what was set.
    """
    shape, start, end = _read(value, name)
    for number in (start, end):
        if not math.isfinite(number):
            raise UserError(f"{name} is {value}; wanted a finite number, or a schedule such as linear(4, 1)")
    return start, end


def value_at(value: Value, progress: Array | float) -> Array | float:
    """Return the value after a share of the run, 0 to 1: a constant stays a Python number."""
    shape, start, end = _read(value, "the value")
    return start if shape is None or start == end else start + (end - start) * SHAPES[shape](progress)


def _read(value: Value, name: str) -> tuple[str | None, float, float]:
    if not isinstance(value, str):
        return None, float(value), float(value)
    match = re.fullmatch(r"\s*(\w+)\(([^,()]+),([^,()]+)\)\s*", value)
    try:
        if not match:
            return None, float(value), float(value)
        shape, start, end = match[1], float(match[2]), float(match[3])
    except ValueError:
        raise UserError(f"{name} is {value!r}; wanted a number, or a schedule such as linear(4, 1)") from None
    if shape not in SHAPES:
        raise UserError(f"{name}: no schedule {shape!r}{did_you_mean(shape, SHAPES)}; wanted {' or '.join(SHAPES)}")
    return shape, start, end
