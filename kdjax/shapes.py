"""What every part of kdjax agrees on: the letters of dimensions and the values that cross from one part to another.

Models, data and losses never import each other; they meet here and in plain arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax.errors import UserError

Array = Any
"""A numpy or a jax array; names carry the shape: ``logits_BTV``."""

DIMENSIONS = {
    "B": "batch rows",
    "T": "tokens of a row",
    "D": "model width",
    "H": "query heads",
    "G": "key/value heads",
    "K": "width of a head",
    "F": "mlp width",
    "E": "experts of a layer",
    "V": "vocabulary",
    "L": "layers",
    "N": "flattened rows (tokens)",
    "R": "rows (positions) picked of an example",
    "S": "slots of a key/value cache",
    "C": "tokens of a chunk",
    "P": "picks of a top-k, draws, or tokens of a prefix",
    "A": "microbatches of a step",
    "M": "layers of the encoder in an encoder-decoder",
    "U": "buckets of distances",
    "X": "token types",
    "Y": "labels of a classifier",
    "Z": "model width, once more",
    "Q": "candidate prompts",
    "J": "examples that prompts are judged by",
    "O": "rows of a teacher that has other tokens",
}


def _static() -> Any:
    return field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What one model sees of a batch.

    Attributes:
        tokens_BT: token ids, int32; below 0 the places of a gist (`gist_places`), which only a model with one takes.
        segment_BT: the document a token belongs to, counted from 1 in each row; 0 is padding. Tokens attend to
            tokens of their own segment only (a decoder's to earlier ones), and to that segment of the encoder.
        position_BT: the token's position within its segment, from 0.
        encoder: the encoder's view in an encoder-decoder, otherwise None.
        type_BT: which of two sentences it is in, for encoders that have token types; None means the first.
    """

    tokens_BT: Array
    segment_BT: Array
    position_BT: Array
    encoder: View | None = None
    type_BT: Array | None = None


class Spans(NamedTuple):
    """How the texts of a batch fall into chunks where student and teacher have different tokenizers.

    Attributes:
        chunk_BR: of each compared row the number of the chunk that its target is in, from 1; 0: in none.
        teacher_rows_BO: positions in the teacher's row, those first that have a target.
        teacher_targets_BO: the teacher's token that comes next there.
        teacher_chunk_BO: the number of the chunk that this is in, as of the student's.
    """

    chunk_BR: Array
    teacher_rows_BO: Array
    teacher_targets_BO: Array
    teacher_chunk_BO: Array


class Drawn(NamedTuple):
    """How likely a batch's targets were when they were drawn, as log-probabilities of each given what stands before it.

    Attributes:
        student_BR: by the student as it was then.
        source_BR: by what drew them: that student, or its mixture with the teacher.
    """

    student_BR: Array
    source_BR: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One step's examples: the views of student and teacher, and the rows at which they are compared.

    Row r of example b compares the student's hidden state at `student_rows_BR[b, r]` with the teacher's at
    `teacher_rows_BR[b, r]`; both predict `targets_BR[b, r]`. So the label shift, the alignment of two views and
    leaving out what has no weight are one gather.

    Attributes:
        student: what the student sees.
        teacher: what the teacher sees; None means the student's view (and rows).
        student_rows_BR: positions in the student's row, int32.
        teacher_rows_BR: positions in the teacher's row; None exactly when `teacher` is None.
        targets_BR: the token that comes next, int32.
        ce_weight_BR: weight of the cross entropy to the target, float32; 0 leaves the row out.
        kd_weight_BR: weight of the divergence to the teacher, float32.
        signal: what the teacher says, when the batch brings it along (a cache); None with a live teacher.
        source_BR: which of the data's sources the example is of, int32; None where no teacher is chosen by it.
        spans: of a teacher with another tokenizer; its view and rows are then in its own tokens.
        drawn: of answers that the student as it is now has not drawn by itself; None of its own, and of the data's.
    """

    student: View
    student_rows_BR: Array
    targets_BR: Array
    ce_weight_BR: Array
    kd_weight_BR: Array
    teacher: View | None = None
    teacher_rows_BR: Array | None = None
    signal: Any = None
    source_BR: Array | None = None
    spans: Spans | None = None
    drawn: Drawn | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: ``soft_cap·tanh(scale·(h @ w + bias) / soft_cap)``.

    Attributes:
        w_DV: the matrix in its stored dtype; the loss casts inside, so that its gradient leaves in float32.
        bias_V: or None.
        vocab_size: the real vocabulary; columns from there on are padding and get no probability.
        soft_cap: or None.
        scale: factor on the logits, or None.
    """

    w_DV: Array
    bias_V: Array | None = None
    vocab_size: int = _static()
    soft_cap: float | None = _static()
    scale: float | None = _static()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What a model gives: hidden states after the last norm (never logits), taps asked for, and extra losses.

    Attributes:
        hidden_BTD: in the compute dtype.
        taps: tensors of inner layers, by name; empty unless asked for.
        aux: further sums (a load-balancing loss, say), by name.
        cache: the updated key/value cache when decoding, otherwise None.
    """

    hidden_BTD: Array
    taps: dict[str, Array] = field(default_factory=dict)
    aux: dict[str, Array] = field(default_factory=dict)
    cache: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Signal:
    """What the teacher says about a batch's rows: its hidden states there and its head. Carries no gradient.

    Attributes:
        hidden_ND: after the last norm, at the compared rows.
        head: the teacher's.
        taps: tensors of the inner layers that were asked for, by name: [layers asked for, B, T, ...].
        student_of_U: of each of the teacher's entries the student's that it counts as; None: one vocabulary.
        chunks_BR: of a teacher with another tokenizer the log-probability of the chunk that a row's target is in.
    """

    hidden_ND: Array
    head: Head
    taps: dict[str, Array] = field(default_factory=dict)
    student_of_U: Array | None = None
    chunks_BR: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixture:
    """What several teachers say as one: the distribution Σ_k w_k·p_k at the temperature asked for.

    Attributes:
        signals: one of each teacher; all have the student's vocabulary.
        weights_K: of each, summing to 1; or weights_NK, where they differ by token.
    """

    signals: tuple[Signal, ...]
    weights_K: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """The teacher's most likely entries at each row, and the mass of all others together.

    Attributes:
        ids_NP: vocabulary entries, int32, no entry twice in a row.
        log_probs_NP: of these, at `temperature`; nothing is renormalised.
        log_tail_N: log of the mass of all entries that are not among them.
        temperature: at which the teacher spoke; no other can be had from it.
    """

    ids_NP: Array
    log_probs_NP: Array
    log_tail_N: Array
    temperature: float = field(default=1.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """Entries drawn at random from what the teacher says at each row, unbiased: E Σ_j weights_j·1[ids_j = v] = p(v).

    Paper: Anshumann et al. 2025, Sparse Logit Sampling, arXiv:2503.16870, section 3.

    Attributes:
        ids_NP: vocabulary entries, int32; one may come several times.
        weights_NP: p(id) / (P·probability of the draw).
        log_probs_NP: log p(id) at `temperature`.
        temperature: at which the teacher spoke; no other can be had from it.
    """

    ids_NP: Array
    weights_NP: Array
    log_probs_NP: Array
    temperature: float = field(default=1.0, metadata={"static": True})


AnySignal = Signal | Mixture | TopK | Sampled


class Axes(NamedTuple):
    """Names of the mesh axes over which a function's arguments are spread: none, unless it runs under shard_map."""

    batch: tuple[str, ...] = ()
    """These hold other tokens."""
    tensor: str | None = None
    """This one holds other parts of the vocabulary."""


def in_parts(x_B: Array, parts: int) -> Array:
    """Return x as [A, B/A, …]; part a has the rows a, a + A, …, so that each spans all devices evenly."""
    return x_B.reshape(x_B.shape[0] // parts, parts, *x_B.shape[1:]).swapaxes(0, 1)


def left_padded(rows: Sequence[Sequence[int]], unit: int) -> View:
    """Return token rows ending in the same column, padding (segment 0) before them to a multiple of `unit`."""
    width = -(-max(map(len, rows)) // unit) * unit
    tokens_BT, segment_BT, position_BT = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for row, tokens in enumerate(rows):
        tokens_BT[row, -len(tokens) :] = tokens
        segment_BT[row, -len(tokens) :] = 1
        position_BT[row, -len(tokens) :] = np.arange(len(tokens))
    return View(tokens_BT, segment_BT, position_BT)


def gist_places(count: int) -> list[int]:
    """Return what stands for the places of a gist in a view's tokens, in order: -1, -2, …"""
    return [-1 - place for place in range(count)]


def check_shapes(**arrays: Array) -> dict[str, int]:
    """Return the size of each dimension letter, having checked that all arrays agree.

    The letters are the part of each keyword after its last underscore: ``check_shapes(student_BTV=s, teacher_BTV=t)``.

    Raises:
        UserError: ``V is 32000 in student_BTV but 128256 in teacher_BTV``.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        letters = name.rsplit("_", 1)[-1]
        shape = tuple(array.shape)
        if len(letters) != len(shape):
            raise UserError(f"{name} has shape {shape}: {len(shape)} dimensions, wanted {len(letters)} ({letters})")
        for letter, size in zip(letters, shape, strict=True):
            known, where = sizes.setdefault(letter, (size, name))
            if known != size:
                raise UserError(f"{letter} is {known} in {where} but {size} in {name}")
    return {letter: size for letter, (size, _) in sizes.items()}
