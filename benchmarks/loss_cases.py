"""What benchmarks.loss measures: its inputs, and each way of computing the loss, ready to run.

All compute value and gradients (student's hidden states, head matrix) of 0.5·cross entropy + 0.5·divergence at
temperature 1, on hidden states and matrices of one dtype; a peer without a cross entropy leaves it out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import loss_peers
from benchmarks.harness import Meter, Variant, available_bytes, resident_growth
from kdjax.losses import DIVERGENCES, ObjectiveConfig, fused_kd_loss, head_logits
from kdjax.losses.chunk import COMPARED, Dense
from kdjax.losses.logits import vocabulary
from kdjax.losses.schedules import value_at
from kdjax.shapes import Array, Head, Signal

DTYPES: dict[str, Any] = {"f32": jnp.float32, "bf16": jnp.bfloat16}
MATMUL_TOKENS = 1024
KL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}


class Size(NamedTuple):
    """How large a problem is."""

    tokens: int
    vocab: int
    student: int
    teacher: int

    def __str__(self) -> str:
        return f"N {self.tokens:,}, V {self.vocab:,}, D {self.student:,}/{self.teacher:,}"

    @property
    def floor(self) -> float:
        """Operations that no way can do without: 2·N·V·(D_s + D_t) forward, 4·N·V·D_s backward."""
        return 2.0 * self.tokens * self.vocab * (3 * self.student + self.teacher)

    def bytes(self, dtype: str) -> int:
        """Return the memory of hidden states and matrices."""
        return (self.tokens + self.vocab) * (self.student + self.teacher) * DTYPES[dtype].dtype.itemsize


class Case(NamedTuple):
    """One group of rows: everything in it is measured in the same interleaved rounds."""

    size: Size
    dtype: str
    divergence: str
    rounds: int = 7
    least: int = 3
    peer_rounds: int = 0

    def __str__(self) -> str:
        peers_too = f", peers {self.peer_rounds}" if self.peer_rounds else ""
        return f"{self.divergence}, {self.size}, {self.dtype}, rounds {self.rounds}{peers_too}"


class Inputs(NamedTuple):
    """What the loss is given; weights are divided by their sum."""

    student_ND: Array
    student_DV: Array
    teacher_ND: Array
    teacher_DV: Array
    targets_N: Array
    weight_N: Array


class Skipped(Exception):
    """A variant that cannot be measured here; the message says why."""


class NotInstalled(Skipped):
    """A peer that is not there at all."""


def say_skipped(name: str, where: str, reason: Skipped) -> None:
    """Print why a variant is left out; of one that is not installed, once."""
    if not isinstance(reason, NotInstalled):
        print(f"skipped {name} in {where}: {reason}", file=sys.stderr, flush=True)
    elif name not in _SAID:
        _SAID.add(name)
        print(f"skipped {name} everywhere: {reason}", file=sys.stderr, flush=True)


_SAID: set[str] = set()


def known(divergence: str) -> bool:
    """Return whether the engine has this divergence, parameters left out."""
    return divergence.partition("(")[0] in DIVERGENCES


def beta_of(divergence: str) -> float | None:
    """Return the beta by which peers call a divergence: 0 forward KL, 1 reverse KL; None if they have none."""
    found = re.fullmatch(r"jsd\(beta=([\d.]+)\)", divergence)
    return float(found[1]) if found else KL_BETA.get(divergence)


def make_inputs(size: Size, dtype: str, *, std: float = 1.0, seed: int = 0) -> Inputs:
    """Return random inputs whose logits have standard deviation `std` in both models."""
    random = np.random.default_rng(seed)

    def normal(rows: int, columns: int, scale: float) -> Array:
        x = random.standard_normal((rows, columns), dtype=np.float32)
        x *= np.float32(scale)
        return jnp.asarray(x, DTYPES[dtype])

    n, v, s, t = size
    hidden = normal(n, s, 1.0), normal(s, v, std / s**0.5), normal(n, t, 1.0), normal(t, v, std / t**0.5)
    return Inputs(*hidden, jnp.asarray(random.integers(0, v, n), jnp.int32), jnp.full(n, 1 / n, jnp.float32))


def half_masked(inputs: Inputs) -> Inputs:
    """Return inputs of which half of the tokens, drawn at random, have weight 0."""
    n = inputs.weight_N.size
    keep_N = np.random.default_rng(1).permutation(n) < (n + 1) // 2
    return inputs._replace(weight_N=jnp.asarray(keep_N / keep_N.sum(), jnp.float32))


def chunked(objective: ObjectiveConfig, x: Inputs) -> tuple[Array, dict[str, Array]]:
    """Return the loss as the engine computes it, and its parts."""
    head, signal = _heads(x)
    return fused_kd_loss(x.student_ND, head, signal, x.targets_N, x.weight_N, x.weight_N, objective)


def _textbook_jsd(student_NV: Array, teacher_NV: Array) -> Array:
    q_NV, p_NV = jnp.exp(student_NV), jnp.exp(teacher_NV)
    log_m_NV = jnp.log(0.5 * (p_NV + q_NV))
    return 0.5 * (p_NV * (teacher_NV - log_m_NV) + q_NV * (student_NV - log_m_NV))


TEXTBOOK: dict[str, Callable[[Array, Array], Array]] = {
    "forward_kl": lambda student_NV, teacher_NV: jnp.exp(teacher_NV) * (teacher_NV - student_NV),
    "jsd(beta=0.5)": _textbook_jsd,
}
"""Terms as one would write them down first: less exact than the engine's, and smaller, so the fairer thing to beat."""


def plain(objective: ObjectiveConfig, x: Inputs) -> tuple[Array, dict[str, Array]]:
    """Return the same loss from whole logits, by autodiff; of the parts the cross entropy and divergence alone."""
    head, signal = _heads(x)
    student_NV, teacher_NV = head_logits(x.student_ND, head), head_logits(x.teacher_ND, signal.head)
    log_NV, log_teacher_NV = jax.nn.log_softmax(student_NV), jax.nn.log_softmax(teacher_NV)
    ce = -jnp.sum(x.weight_N * jnp.take_along_axis(log_NV, x.targets_N[:, None], axis=1)[:, 0])
    if objective.divergence in TEXTBOOK:
        loss_N = jnp.sum(TEXTBOOK[objective.divergence](log_NV, log_teacher_NV), axis=-1)
    else:
        over, (term,) = vocabulary(head), objective.all_terms
        dense, is_target_NV = Dense((teacher_NV,), None), over.is_one(x.targets_N)
        loss_N = COMPARED[Dense](term, 1.0, student_NV, dense, over, is_target_NV)
    kd = jnp.sum(x.weight_N * loss_N)
    alpha = value_at(objective.alpha, 0.0)
    return alpha * ce + (1 - alpha) * kd, {"ce": ce, "kd": kd}


def _heads(x: Inputs) -> tuple[Head, Signal]:
    v = x.student_DV.shape[1]
    return Head(x.student_DV, vocab_size=v), Signal(x.teacher_ND, Head(x.teacher_DV, vocab_size=v))


def gradients(loss: Callable[..., Any], objective: ObjectiveConfig, x: Inputs) -> Any:
    """Return ((value, parts), (dh_ND, dw_DV))."""

    def of(student_ND: Array, student_DV: Array) -> Any:
        return loss(objective, x._replace(student_ND=student_ND, student_DV=student_DV))

    return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(x.student_ND, x.student_DV)


def matmuls(x: Inputs, d_CV: Array) -> Array:
    """Return something of the loss's four products alone (both logits, dh and dW), C tokens at a time.

    Each is made whole, accumulated in float32, into memory that the next chunk uses again, as the loss does.
    """

    def product(what: str, a: Array, b: Array) -> Array:
        return jnp.einsum(what, a, b, preferred_element_type=jnp.float32)

    def add(total: Array, hidden: tuple[Array, Array]) -> tuple[Array, None]:
        # Tied together, so that no product is the same in all chunks, and none is made in part.
        (student_CD, teacher_CD), d = lax.optimization_barrier((hidden, d_CV))
        products = product("cd,dv->cv", student_CD, x.student_DV), product("cd,dv->cv", teacher_CD, x.teacher_DV)
        products += product("cv,dv->cd", d, x.student_DV), product("cd,cv->dv", student_CD, d)
        return total + sum(made[0, 0] for made in lax.optimization_barrier(products)), None

    chunks = (hidden_ND.reshape(-1, d_CV.shape[0], hidden_ND.shape[1]) for hidden_ND in (x.student_ND, x.teacher_ND))
    return lax.scan(add, jnp.float32(0), tuple(chunks))[0]


def _compiled(work: Callable[..., Any], *arguments: Any) -> Any:
    return jax.jit(work).lower(*arguments).compile()


def _jax_variant(name: str, case: Case, compiled: Any, arguments: tuple[Any, ...], cost: float) -> Variant:
    """Return a variant of what is compiled, or raise Skipped if its memory is not there."""
    sizes: Any = compiled.memory_analysis()
    temporary, results = sizes.temp_size_in_bytes, sizes.output_size_in_bytes
    _room(temporary + results, _free_bytes())

    def run() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    on_cpu = jax.default_backend() == "cpu"
    meter = resident_growth if on_cpu else _analysed(temporary + results)
    facts = {"temp_bytes": temporary, "measured_by": "resident" if on_cpu else "analysis"}
    return Variant(name, run, case.rounds, cost, meter, facts)


def _analysed(size: int) -> Meter:
    def meter(run: Callable[[], Any]) -> int:
        run()
        return size

    return meter


def _free_bytes() -> int:
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else available_bytes()


def _room(wanted: float, free: float) -> None:
    if wanted > 0.95 * free:
        raise Skipped(f"needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def engine_makers(case: Case, x: Inputs, objective: ObjectiveConfig) -> dict[str, Callable[[], Variant]]:
    """Return how to make the engine's variants, the plain one and the bare matmuls."""
    floor = case.size.floor
    compiled = cache(lambda loss: _compiled(partial(gradients, loss, objective), x))

    def of(name: str, loss: Callable[..., Any], inputs: Inputs, cost: float) -> Variant:
        tokens = int(jnp.count_nonzero(inputs.weight_N))
        variant = _jax_variant(name, case, compiled(loss), (inputs,), cost * floor)
        in_chunks = loss is chunked
        less_dw, with_dw = with_and_without_dw(case, variant.facts["temp_bytes"], in_chunks)
        facts = {"weighted_tokens": tokens, "temp_less_dw_bytes": less_dw, "temp_with_dw_bytes": with_dw}
        return replace(variant, facts=variant.facts | facts | {"alpha": objective.alpha})

    return {
        "plain": lambda: of("plain", plain, x, 2.6),
        "chunked": lambda: of("chunked", chunked, x, 1.2),
        "chunked, half masked": lambda: of("chunked, half masked", chunked, half_masked(x), 0.6),
        "matmuls": lambda: _matmul_variant(case, x),
    }


def with_and_without_dw(case: Case, temporary: int, in_chunks: bool) -> tuple[int, int]:
    """Return temporary memory without and with the float32 sum of dW, which only the chunked loss has.

    It lies in the result where the result is float32 itself, and is temporary where it is cast at the end.
    """
    dw = 4 * case.size.student * case.size.vocab if in_chunks else 0
    return (temporary, temporary + dw) if case.dtype == "f32" else (max(0, temporary - dw), temporary)


def _matmul_variant(case: Case, x: Inputs) -> Variant:
    chunk = next(size for size in range(min(MATMUL_TOKENS, case.size.tokens), 0, -1) if case.size.tokens % size == 0)
    d_CV = (x.student_ND[:chunk] @ x.student_DV).astype(x.student_ND.dtype)
    variant = _jax_variant("matmuls", case, _compiled(matmuls, x, d_CV), (x, d_CV), case.size.floor)
    return replace(variant, facts=variant.facts | {"operations": case.size.floor, "weighted_tokens": case.size.tokens})


def peer_makers(case: Case, x: Inputs, alpha: float) -> dict[str, Callable[[], Variant]]:
    """Return how to make the peers' variants; all share one copy of the inputs in torch."""

    @cache
    def arguments(device: str) -> tuple[Any, ...]:
        _room(case.size.bytes(case.dtype), _torch_free(device))
        return loss_peers.place(problem(x), device)

    def of(name: str, peer: loss_peers.Peer) -> Variant:
        device, loss = peer_loss(peer, case.divergence, alpha)
        tokens = min(case.size.tokens, peer.chunk or case.size.tokens)
        logits = 4 * peer.copies[case.dtype == "bf16"] * tokens * case.size.vocab
        placed = arguments(device)
        _room(logits + 8 * case.size.student * case.size.vocab, _torch_free(device))
        run = loss_peers.closure(loss, placed)
        _guarded(run)
        on_cpu = device == "cpu"
        facts = {"alpha": alpha if peer.has_ce else 0.0, "weighted_tokens": case.size.tokens}
        facts["measured_by"] = "resident" if on_cpu else "torch allocator"
        meter = resident_growth if on_cpu else loss_peers.cuda_growth
        return Variant(name, run, case.peer_rounds, peer.cost * case.size.floor, meter, facts)

    return {name: partial(of, name, peer) for name, peer in loss_peers.PEERS.items()}


def peer_loss(peer: loss_peers.Peer, divergence: str, alpha: float) -> tuple[str, loss_peers.Loss]:
    """Return torch's device and the peer's loss, or raise Skipped where it is not installed or has no such loss."""
    beta = beta_of(divergence)
    if beta is None:
        raise Skipped(f"has no {divergence}")
    try:
        device = loss_peers.device_for(jax.default_backend())
        if peer.needs_cuda and device == "cpu":
            raise NotInstalled("it runs on a GPU alone")
        return device, peer.make(alpha, beta)
    except ImportError as error:
        raise NotInstalled(f"not installed ({error}); benchmarks/loss_peers.py says how") from error


def _guarded(run: Callable[[], Any]) -> None:
    """Run once, so that what is compiled late is compiled; what goes wrong inside a peer ends that peer alone."""
    try:
        run()
    except Exception as error:
        raise Skipped(f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error


def _torch_free(device: str) -> int:
    return available_bytes() if device == "cpu" else loss_peers.cuda_free()


def problem(x: Inputs) -> loss_peers.Problem:
    """Return the inputs as peers take them."""
    return loss_peers.Problem(*(np.asarray(array) for array in x[:5]))
