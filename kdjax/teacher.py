"""What the teacher says about a batch: one small function a kind of signal, each ``signal_of(frozen, batch)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError
from kdjax.losses import ObjectiveConfig, Shard, of_head, sample, target_log_probs, top_k
from kdjax.models import Model
from kdjax.shapes import AnySignal, Array, Batch, Mixture, Sampled, Signal, TopK, in_parts

SignalOf = Callable[[Any, Batch], AnySignal | None]
"""``signal_of(frozen, microbatch)``: called inside the microbatch loop."""


def pick_rows(hidden_BTD: Array, rows_BR: Array) -> Array:
    """Return hidden_ND at the given rows of each example, N = B·R."""
    picked_BRD = jnp.take_along_axis(hidden_BTD, rows_BR[:, :, None], axis=1, mode="promise_in_bounds")
    return picked_BRD.reshape(-1, hidden_BTD.shape[-1])


def no_teacher(frozen: Any, batch: Batch) -> None:
    """Return nothing: pre-training, the cross entropy alone."""
    return None


def live_teacher(model: Model, layers: Mapping[str, tuple[int, ...]] | None = None, name: str = "teacher") -> SignalOf:
    """Return the signal of a teacher that is run on every microbatch; its parameters are ``frozen[name]``.

    What stands before every example that it sees is ``frozen["teacher_prefix"]``, if there is that.

    Args:
        model: the teacher.
        layers: tap -> the layers of it that the signal brings along.
        name: of its frozen tree.
    """
    layers = layers or {}

    def signal_of(frozen: Any, batch: Batch) -> Signal:
        params, prefix = lax.stop_gradient((frozen[name], frozen.get("teacher_prefix")))
        view = batch.student if batch.teacher is None else batch.teacher
        rows_BR = batch.student_rows_BR if batch.teacher_rows_BR is None else batch.teacher_rows_BR
        output = model.apply(params, view, taps=tuple(layers), prefix=prefix)
        taps = {name: jnp.stack([output.taps[name][i] for i in numbers]) for name, numbers in layers.items()}
        hidden_ND, taps = lax.stop_gradient((pick_rows(output.hidden_BTD, rows_BR), taps))
        return Signal(hidden_ND, model.head(params), taps)

    return signal_of


def of_chunk(x_BX: Array, chunk_BX: Array, chunk_BR: Array) -> Array:
    """Return at each row the sum of x over the chunk that it is in; 0 where it is in none."""
    rows_B1 = jnp.arange(len(x_BX))[:, None]
    sums_BK = jnp.zeros((len(x_BX), chunk_BR.shape[1] + 1)).at[rows_B1, chunk_BX].add(x_BX, mode="drop")
    return jnp.where(chunk_BR > 0, jnp.take_along_axis(sums_BK, chunk_BR, axis=1), 0.0)


def other_teacher(model: Model, student_of_U: Array, objective: ObjectiveConfig, shard: Shard) -> SignalOf:
    """Return the signal of a live teacher that has another tokenizer: at common borders, and of the chunks between.

    Args:
        model: the teacher, whose parameters are ``frozen["teacher"]``.
        student_of_U: as of `Signal`.
        objective: its chunk size of tokens is used.
        shard: of the loss.
    """

    def signal_of(frozen: Any, batch: Batch) -> Signal:
        params, view, rows_BR, spans = (
            lax.stop_gradient(frozen["teacher"]),
            batch.teacher,
            batch.teacher_rows_BR,
            batch.spans,
        )
        if view is None or rows_BR is None or spans is None:
            raise ValueError("a batch lacks the teacher's own tokens")
        hidden_BTD, head = model.apply(params, view).hidden_BTD, model.head(params)
        own_ND, targets_N = pick_rows(hidden_BTD, spans.teacher_rows_BO), spans.teacher_targets_BO.reshape(-1)
        log_p_N = target_log_probs(own_ND, head, targets_N, objective, shard=shard)
        log_p_BO = log_p_N.reshape(spans.teacher_targets_BO.shape)
        chunks_BR = of_chunk(log_p_BO, spans.teacher_chunk_BO, spans.chunk_BR)
        given = lax.stop_gradient((pick_rows(hidden_BTD, rows_BR), chunks_BR))
        return Signal(given[0], head, {}, jnp.asarray(student_of_U), given[1])

    return signal_of


def mixed(signals_of: Sequence[SignalOf], shares_SK: Array) -> SignalOf:
    """Return what several teachers say as one: each is run on every microbatch, and weighs what its share is there.

    Args:
        signals_of: of each teacher, the hidden states and head.
        shares_SK: what each weighs for the examples of each source, `Batch.source_BR`; one row is that of all.
    """

    def signal_of(frozen: Any, batch: Batch) -> Mixture:
        signals: Any = tuple(of(frozen, batch) for of in signals_of)
        source_BR: Any = batch.source_BR
        weights_SK = jnp.asarray(shares_SK)
        if len(shares_SK) == 1:
            return Mixture(signals, weights_SK[0])
        return Mixture(signals, jnp.take(weights_SK, source_BR.reshape(-1), axis=0, mode="clip"))

    return signal_of


Said = dict[str, Array]
"""What a teacher says of some rows, by name: [N, …], or [B, R, …] where a batch brings it."""


PICKS = {"topk": 64, "sampled": 12}
"""How many entries are kept of a token unless a config says otherwise."""


@dataclass(frozen=True)
class LabelConfig:
    """What `kdjax label` keeps of what the teacher says, and how."""

    kind: Literal["topk", "sampled", "hidden"] = "topk"
    """topk: the likeliest entries, and the mass of the others; sampled: entries drawn at random, unbiased for forward
    KL and soft cross entropy (arXiv:2503.16870); hidden: the last hidden state, of which the whole distribution can be
    had at any temperature."""
    picks: int = 0
    """topk: entries of a token; sampled: draws; 0 is 64 (20 of a server) and 12."""
    bits: Literal[0, 8, 16] = 0
    """Of each log-probability, in equal steps from a token's lowest to its highest; of each number of a hidden state:
    16 is bfloat16, 8 is int8 with a scale a token. 0 is 8, and 16 of hidden states."""
    batches: int = 0
    """How many batches are labelled, those that training would read first; 0 is as many as there are steps."""
    shard_rows: int = 1024
    """Rows of a file; of several processes each writes its own part of them."""
    seed: int = 0
    """Of draws."""

    def __post_init__(self) -> None:
        for name, least in {"picks": 0, "batches": 0, "shard_rows": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"label.{name} is {getattr(self, name)}; wanted at least {least}")
        if self.kind == "sampled" and self.picks > 255:
            raise UserError(f"label.picks is {self.picks}; wanted at most 255 draws")

    @property
    def kept_bits(self) -> int:
        """Bits of a number."""
        return self.bits or (16 if self.kind == "hidden" else 8)

    @property
    def entries(self) -> int:
        """Entries that are kept of a token; 0 of a hidden state."""
        return self.picks or PICKS.get(self.kind, 0)


@dataclass(frozen=True)
class Saying:
    """What is kept of what a teacher says at a row.

    Attributes:
        kind: a row of `SAYINGS`.
        picks: entries of a top-k, or draws.
        temperature: of what is kept of logits.
        seed: of draws.
    """

    kind: str = "hidden"
    picks: int = 0
    temperature: float = 1.0
    seed: int = 0


def _hidden(saying: Saying, signal: Signal, numbers_N: Array | None) -> Said:
    return {"hidden": signal.hidden_ND}


def _top_k(saying: Saying, signal: Signal, numbers_N: Array | None) -> Said:
    def read(log_probs_CV: Array, log_z_C: Array, rows_C: Array) -> Said:
        best = top_k(log_probs_CV, saying.picks)
        return {"ids": best.ids_NP, "log_probs": best.log_probs_NP, "log_tail": best.log_tail_N, "log_z": log_z_C}

    return of_head(signal.hidden_ND, signal.head, saying.temperature, read)


def _sampled(saying: Saying, signal: Signal, numbers_N: Array | None) -> Said:
    if numbers_N is None:
        raise ValueError("draws go by the numbers of the batch's rows, but its signal has no row_B")

    def read(log_probs_CV: Array, log_z_C: Array, rows_C: Array) -> Said:
        keys_C = jax.vmap(partial(jax.random.fold_in, jax.random.key(saying.seed)))(numbers_N[rows_C])
        drawn = sample(keys_C, log_probs_CV, saying.picks)
        return {"ids": drawn.ids_NP, "log_probs": drawn.log_probs_NP}

    return of_head(signal.hidden_ND, signal.head, saying.temperature, read)


SAYINGS: dict[str, Callable[[Saying, Signal, Array | None], Said]] = {
    "hidden": _hidden,
    "topk": _top_k,
    "sampled": _sampled,
}
"""Name -> what is kept of a signal, N rows of it; the last argument is a number of its own for each row."""


def speaking(
    model: Model,
    layers: Mapping[str, tuple[int, ...]],
    microbatches: int,
    saying: Saying = Saying(),  # noqa: B008 (a constant)
) -> Callable[[Any, Batch], dict[str, Any]]:
    """Return what a teacher that is not run in the step runs: ``speak(frozen, batch)``, of a whole batch.

    It gives what `brought` makes a signal of: `said` at the compared rows, [B, R, …] by name, and `taps`, the tensors
    of inner layers that are asked for, [B, layers asked for, T, …] by name. Draws go by the number of each of the
    batch's rows in the whole of the data, `batch.signal["row_B"]`.
    """
    signal_of = live_teacher(model, layers)

    def of_some(frozen: Any, batch: Batch) -> dict[str, Any]:
        signal: Any = signal_of(frozen, batch)
        b, r = batch.student_rows_BR.shape
        numbers_N = None
        if batch.signal is not None:
            first_B1 = batch.signal["row_B"].astype(jnp.uint32)[:, None] * r
            numbers_N = (first_B1 + jnp.arange(r, dtype=jnp.uint32)[None]).ravel()
        said = SAYINGS[saying.kind](saying, signal, numbers_N)
        said = {name: x.reshape(b, r, *x.shape[1:]) for name, x in said.items()}
        return {"said": said, "taps": {name: jnp.swapaxes(tap, 0, 1) for name, tap in signal.taps.items()}}

    def speak(frozen: Any, batch: Batch) -> dict[str, Any]:
        parts = jax.tree.map(lambda x: in_parts(x, microbatches), batch)
        with jax.named_scope("teacher"):
            said = lax.map(lambda some: of_some(frozen, some), parts)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), said)

    return speak


def brought(model: Model, temperature: float = 1.0) -> SignalOf:
    """Return the signal that a batch brings along, said by `speaking`; of the teacher at most its head is wanted here.

    What the head is made of is ``frozen["teacher_head"]`` (`Model.head_part`).

    Args:
        model: the teacher; a top-k or draws are read without it.
        temperature: that a top-k or draws were taken at.
    """

    def signal_of(frozen: Any, batch: Batch) -> AnySignal:
        said = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.signal["said"].items()}
        if "weights" in said:
            return Sampled(said["ids"], said["weights"], said["log_probs"], temperature)
        if "ids" in said:
            return TopK(said["ids"], said["log_probs"], said["log_tail"], temperature)
        taps = {name: jnp.swapaxes(tap, 0, 1) for name, tap in batch.signal["taps"].items()}
        return Signal(said["hidden"], model.head(lax.stop_gradient(frozen["teacher_head"])), taps)

    return signal_of
