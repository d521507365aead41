"""Logits of a head, and what is read off them; the vocabulary may be spread over the devices of a tensor axis.

All arithmetic is float32. Nothing here reduces over V but through `Vocabulary`, which joins the devices' parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from kdjax.shapes import Array, Axes, Head

NOWHERE = -1e30
"""The logit of an entry that does not exist or is left out: finite, so that two of them differ by 0, not NaN."""


@dataclass(frozen=True)
class Vocabulary:
    """The columns of a logits array, some of which may lie on other devices.

    Attributes:
        columns: how many this device holds.
        size: how many entries are real, over all devices; the rest is padding.
        axes: over which devices the columns are spread.
    """

    columns: int
    size: int
    axes: Axes = Axes()  # noqa: RUF009 (a constant)

    @property
    def parts(self) -> int:
        """Over how many devices the columns are spread."""
        return 1 if self.axes.tensor is None else lax.axis_size(self.axes.tensor)

    @property
    def is_padded(self) -> bool:
        """Whether some columns are no entries."""
        return self.columns * self.parts > self.size

    @property
    def first(self) -> Array | int:
        """The entry of this device's first column."""
        return 0 if self.axes.tensor is None else lax.axis_index(self.axes.tensor) * self.columns

    def ids_1V(self) -> Array:
        """Return the entry that each column stands for."""
        return lax.broadcasted_iota(jnp.int32, (1, self.columns), 1) + self.first

    def sum_V(self, x_NV: Array) -> Array:
        """Return the sum over the vocabulary, x_N."""
        return self._join(jnp.sum, lax.psum, x_NV)

    def max_V(self, x_NV: Array) -> Array:
        """Return the maximum over the vocabulary, x_N, as a constant."""
        return self._join(jnp.max, lax.pmax, lax.stop_gradient(x_NV))

    def is_one(self, ids_N: Array) -> Array:
        """Return in each row True at the given entry's column, is_one_NV (a comparison: never a scatter)."""
        return self.ids_1V() == ids_N[:, None]

    def pick(self, x_NV: Array, ids_NP: Array) -> Array:
        """Return x at some entries of each row, x_NP."""
        local_NP = ids_NP - self.first
        is_here_NP = (local_NP >= 0) & (local_NP < self.columns)
        picked_NP = jnp.take_along_axis(x_NV, jnp.clip(local_NP, 0, self.columns - 1), axis=1)
        return self._whole(jnp.where(is_here_NP, picked_NP, 0.0))

    def picked(self, ids_NP: Array) -> Array:
        """Return True at each row's given entries, picked_NV."""
        local_NP = ids_NP - self.first
        local_NP = jnp.where((local_NP >= 0) & (local_NP < self.columns), local_NP, self.columns)
        rows_N1 = jnp.arange(ids_NP.shape[0])[:, None]
        return jnp.zeros((ids_NP.shape[0], self.columns), bool).at[rows_N1, local_NP].set(True, mode="drop")

    def without_padding(self, x_NV: Array) -> Array:
        """Return x with 0 at the columns that are no entries."""
        return jnp.where(self.ids_1V() < self.size, x_NV, 0.0) if self.is_padded else x_NV

    def _join(self, reduce: Callable[..., Array], join: Callable[..., Array], x_NV: Array) -> Array:
        local_N = reduce(x_NV, axis=-1)
        return local_N if self.axes.tensor is None else join(local_N, self.axes.tensor)

    def _whole(self, x: Array) -> Array:
        return x if self.axes.tensor is None else lax.psum(x, self.axes.tensor)


def vocabulary(head: Head, axes: Axes = Axes()) -> Vocabulary:  # noqa: B008 (a constant)
    """Return the vocabulary of a head, or of this device's part of it."""
    return Vocabulary(head.w_DV.shape[1], head.vocab_size, axes)


def matmul(hidden_ND: Array, head: Head) -> Array:
    """Return the bare product in float32 of hidden states and matrix, which is cast to the hidden states' dtype."""
    w_DV = head.w_DV.astype(hidden_ND.dtype)
    return jnp.einsum("nd,dv->nv", hidden_ND, w_DV, preferred_element_type=jnp.float32)


def finish(raw_NV: Array, head: Head, axes: Axes = Axes()) -> Array:  # noqa: B008 (a constant)
    """Return logits from the bare product: biased, scaled, soft-capped, with padded entries at `NOWHERE`."""
    logits_NV = raw_NV if head.bias_V is None else raw_NV + head.bias_V.astype(jnp.float32)[None, :]
    if head.scale is not None:
        logits_NV = logits_NV * head.scale
    if head.soft_cap is not None:
        logits_NV = head.soft_cap * jnp.tanh(logits_NV / head.soft_cap)
    over = vocabulary(head, axes)
    return jnp.where(over.ids_1V() < over.size, logits_NV, NOWHERE) if over.is_padded else logits_NV


def head_logits(hidden_ND: Array, head: Head, axes: Axes = Axes()) -> Array:  # noqa: B008 (a constant)
    """Return float32 logits_NV of a head: scaled, soft-capped, with padded vocabulary entries at `NOWHERE`."""
    return finish(matmul(hidden_ND, head), head, axes)


def log_softmax(logits_NV: Array, over: Vocabulary) -> Array:
    """Return log-probabilities."""
    shifted_NV = logits_NV - over.max_V(logits_NV)[:, None]
    return shifted_NV - jnp.log(over.sum_V(jnp.exp(shifted_NV)))[:, None]


def log_sum_exp(logits_NV: Array, over: Vocabulary) -> Array:
    """Return log Σ exp, x_N."""
    top_N = over.max_V(logits_NV)
    return top_N + jnp.log(over.sum_V(jnp.exp(logits_NV - top_N[:, None])))


def standardise(logits_NV: Array, over: Vocabulary) -> Array:
    """Return logits with mean 0 and standard deviation 1 over the real vocabulary: a student of any scale may match.

    Paper: Sun et al. 2024, Logit Standardization in Knowledge Distillation, arXiv:2403.01437, algorithm 1.
    """
    mean_N1 = (over.sum_V(over.without_padding(logits_NV)) / over.size)[:, None]
    centred_NV = over.without_padding(logits_NV - mean_N1)
    std_N1 = jnp.sqrt(over.sum_V(centred_NV**2) / over.size + 1e-14)[:, None]
    scaled_NV = centred_NV / std_N1
    return jnp.where(over.ids_1V() < over.size, scaled_NV, NOWHERE) if over.is_padded else scaled_NV
