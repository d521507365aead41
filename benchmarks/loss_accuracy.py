"""How exact each way of computing a divergence is, cross entropy left out: errors relative to float32 whole logits.

The reference gets the same inputs, those rounded to bfloat16 too, so what is compared is arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import loss_peers
from benchmarks.harness import Row
from benchmarks.loss_cases import (
    Inputs,
    Size,
    Skipped,
    beta_of,
    chunked,
    gradients,
    make_inputs,
    peer_loss,
    problem,
    say_skipped,
)
from kdjax.losses import ObjectiveConfig
from kdjax.shapes import Array

SIZE = Size(256, 4096, 64, 96)
STDS = (1.0, 0.1)
SEEN = 64
"""Tokens whose divergences are computed one by one, to see the smallest."""


def relative(found: Array, wanted: Array) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def nearly_equal(x: Inputs) -> Inputs:
    """Return inputs whose teacher is the student, but for a hundredth of each hidden state."""
    near_ND = (x.student_ND.astype(jnp.float32) * 1.01).astype(x.student_ND.dtype)
    return x._replace(teacher_ND=near_ND, teacher_DV=x.student_DV)


def accuracy(objective: ObjectiveConfig, dtype: str, size: Size, with_peers: bool) -> Iterator[Row]:
    """Yield the rows of a divergence at each standard deviation of the logits: the engine's, then the peers'."""
    others = loss_peers.PEERS if with_peers and beta_of(objective.divergence) is not None else {}
    objective = replace(objective, alpha=0.0)
    for std in STDS:
        x = make_inputs(size, dtype, std=std)
        wide = Inputs(*(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in x))
        with jax.default_matmul_precision("highest"):  # a GPU's default would round float32
            wanted = _flat(jax.jit(partial(gradients, chunked, replace(objective, implementation="reference")))(wide))
        common = {"dtype": dtype, "divergence": objective.divergence, "std": std, "value": wanted[0]}
        found = _flat(jax.jit(partial(gradients, chunked, objective))(x))
        smallest = min(_smallest(objective, y) for y in (x, nearly_equal(x)))
        yield common | {"variant": "chunked", "smallest": smallest} | _errors(found, wanted)
        for name, peer in others.items():
            try:
                yield common | {"variant": name} | _peer(peer, objective.divergence, x, wanted)
            except Skipped as reason:
                say_skipped(name, f"accuracy of {objective.divergence}, {dtype}", reason)


def _flat(result: Any) -> tuple[float, Array, Array]:
    (value, _), (dh_ND, dw_DV) = result
    return float(value), np.asarray(dh_ND, np.float32), np.asarray(dw_DV, np.float32)


def _errors(found: tuple[float, Array, Array], wanted: tuple[float, Array, Array]) -> Row:
    names = ("value_error", "dh_error", "dw_error")
    return {name: relative(a, b) for name, a, b in zip(names, found, wanted, strict=True)}


def _smallest(objective: ObjectiveConfig, x: Inputs) -> float:
    """Return the smallest divergence of a token."""

    def of(token: Inputs) -> Array:
        return chunked(objective, token)[0]

    each = jax.jit(partial(_by_token, of))(x)
    return float(each.min())


def _by_token(of: Callable[[Inputs], Array], x: Inputs) -> Array:
    """Return ``of`` each token alone, one after another."""

    def one(token: tuple[Array, Array, Array]) -> Array:
        student_D, teacher_D, target = token
        return of(
            x._replace(
                student_ND=student_D[None],
                teacher_ND=teacher_D[None],
                targets_N=target[None],
                weight_N=jnp.ones(1, jnp.float32),
            )
        )

    return jax.lax.map(one, (x.student_ND[:SEEN], x.teacher_ND[:SEEN], x.targets_N[:SEEN]))


def _peer(peer: loss_peers.Peer, divergence: str, x: Inputs, wanted: tuple[float, Array, Array]) -> Row:
    device, loss = peer_loss(peer, divergence, 0.0)
    try:
        found = loss_peers.in_numpy(loss_peers.closure(loss, loss_peers.place(problem(x), device))())
        smallest = min(_peer_smallest(loss, y, device) for y in (x, nearly_equal(x)))
    except Exception as error:
        raise Skipped(f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return _errors(found, wanted) | {"smallest": smallest}


def _peer_smallest(loss: loss_peers.Loss, x: Inputs, device: str) -> float:
    student_ND, student_VD, teacher_ND, teacher_VD, targets_N = loss_peers.place(problem(x), device)
    tokens = range(min(SEEN, targets_N.shape[0]))
    each = (
        loss(student_ND[i : i + 1], student_VD, teacher_ND[i : i + 1], teacher_VD, targets_N[i : i + 1]) for i in tokens
    )
    return min(float(value) for value in each)
