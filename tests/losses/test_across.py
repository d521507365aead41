"""What is compared with a teacher of another tokenizer, against float64 and whole distributions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import (
    ObjectiveConfig,
    Term,
    chunk_divergence,
    fused_kd_loss,
    log_likelihoods,
    target_log_probs,
)
from kdjax.losses.across import projected, sorted_distance
from kdjax.shapes import Head, Mixture, Signal
from kdjax.sharding import MeshConfig, placement

N, D, V, U = 24, 6, 11, 14
WEIGHTS = np.linspace(0.0, 0.1, N).astype(np.float32)


def log_softmax(x):
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def test_sorted_probabilities_are_compared_the_shorter_filled_up():
    rng = np.random.default_rng(0)
    q, p = log_softmax(rng.standard_normal((5, 4))), log_softmax(rng.standard_normal((5, 7)))
    wanted = []
    for row in range(5):
        ours, theirs = (sorted(np.exp(x[row]), reverse=True) for x in (q, p))
        wanted.append(sum(abs(a - b) for a, b in zip([*ours, 0, 0, 0], theirs, strict=True)))
    np.testing.assert_allclose(sorted_distance(jnp.asarray(q), jnp.asarray(p)), wanted, rtol=1e-5)
    same = sorted_distance(jnp.asarray(p), jnp.asarray(p[:, ::-1]))
    np.testing.assert_allclose(same, 0, atol=1e-6)


def binary_kl(log_q, log_p, tau):
    """In float64, as the paper has it, times τ."""
    p, q = np.exp(log_p / tau), np.exp(log_q / tau)
    return tau * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0, 1e5])
def test_chunks_are_compared_by_whether_they_are_said(tau):
    rng = np.random.default_rng(1)
    log_q, log_p = -rng.exponential(3, (2, 400)) - 0.01
    got = chunk_divergence(jnp.asarray(log_q, jnp.float32), jnp.asarray(log_p, jnp.float32), tau)
    np.testing.assert_allclose(got, binary_kl(log_q, log_p, tau), rtol=2e-4, atol=1e-6)
    step = 1e-6
    slope = (binary_kl(log_q + step, log_p, tau) - binary_kl(log_q - step, log_p, tau)) / (2 * step)
    ours = jax.grad(lambda x: chunk_divergence(x, jnp.asarray(log_p, jnp.float32), tau).sum())(jnp.asarray(log_q))
    np.testing.assert_allclose(ours, slope, rtol=5e-3, atol=5e-4)


def test_chunks_far_near_and_certain_stay_finite():
    cases = jnp.array([-1e4, -300.0, -5.0, -1e-3, -1e-9, 0.0])
    for tau in (1.0, 100.0):
        value, slope = jax.vmap(jax.value_and_grad(partial(chunk_divergence, tau=tau)), (0, None))(cases, -2.0)
        assert np.isfinite(value).all() and np.isfinite(slope).all() and (value >= 0).all()
        np.testing.assert_allclose(chunk_divergence(cases, cases, tau), 0, atol=1e-7)
    a, b = 2.0, 3.0
    limit = a * np.log(a / b) - a + b
    assert float(chunk_divergence(jnp.float32(-b), jnp.float32(-a), 1e4)) == pytest.approx(limit, rel=1e-3)


def models(seed=2):
    """Hidden states, heads (of 11 and 14 entries, a column of padding each) and targets."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((2, N, D)).astype(np.float32)
    matrices = [rng.standard_normal((D, columns + 1)).astype(np.float32) for columns in (V, U)]
    heads = [Head(jnp.asarray(w), vocab_size=size) for w, size in zip(matrices, (V, U), strict=True)]
    return jnp.asarray(states), heads, jnp.asarray(rng.integers(0, V, N))


STUDENT_OF = np.array([3, 3, 0, 10, 4, 5, 6, 7, 1, 2, 8, 0, 0, 9, 9], np.int32)
"""Of the teacher's columns, the last one padding."""


def onto(log_p):
    """The teacher's log-probabilities over the student's entries."""
    found = np.zeros((len(log_p), V))
    for number, entry in enumerate(STUDENT_OF[:U]):
        found[:, entry] += np.exp(log_p[:, number])
    return np.log(found)


EXACT = {
    "forward_kl": lambda q, p: (np.exp(p) * (p - q)).sum(1),
    "reverse_kl": lambda q, p: (np.exp(q) * (q - p)).sum(1),
    "total_variation": lambda q, p: 0.5 * np.abs(np.exp(p) - np.exp(q)).sum(1),
}


@pytest.mark.parametrize("name", [*EXACT, "uld"])
@pytest.mark.parametrize("mesh", [None, {"data": 4, "fsdp": 2}], ids=str)
def test_the_fused_loss_compares_two_vocabularies(name, mesh):
    """At temperature 2, in chunks and on a mesh, in value and gradient: logits in float64 and jax's own derivative."""
    (ours_ND, theirs_ND), (head, other), targets_N = models()
    shard = {"shard": placement(MeshConfig(**mesh), jax.devices()).shard_loss} if mesh else {}
    objective = ObjectiveConfig(alpha=0.25, divergence=name, temperature=2.0, chunk_tokens=5)
    signal = Signal(theirs_ND, other, {}, jnp.asarray(STUDENT_OF))
    weights = jnp.asarray(WEIGHTS), jnp.asarray(WEIGHTS[::-1].copy())

    def loss(hidden_ND, w_DV):
        given = hidden_ND, Head(w_DV, vocab_size=V), signal, targets_N, *weights, objective
        return fused_kd_loss(*given, **shard)

    def plain(hidden_ND, w_DV):
        log_q, log_p = (
            jax.nn.log_softmax((hidden_ND @ w_DV)[:, :V] / 2),
            jax.nn.log_softmax((theirs_ND @ other.w_DV)[:, :U] / 2),
        )
        if name == "uld":
            each, factor = sorted_distance(log_q, log_p), 2
        else:
            q_NB, p_NB = log_q, projected(log_p, jnp.asarray(STUDENT_OF[:U]), V)
            ours = {
                "forward_kl": lambda: (jnp.exp(p_NB) * (p_NB - q_NB)).sum(1),
                "reverse_kl": lambda: (jnp.exp(q_NB) * (q_NB - p_NB)).sum(1),
                "total_variation": lambda: 0.5 * jnp.abs(jnp.exp(p_NB) - jnp.exp(q_NB)).sum(1),
            }
            each, factor = ours[name](), 2 if name == "total_variation" else 4
        ce_N = -jax.nn.log_softmax((hidden_ND @ w_DV)[:, :V])[np.arange(N), targets_N]
        return 0.25 * (weights[0] * ce_N).sum() + 0.75 * factor * (weights[1] * each).sum()

    (value, parts), got = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(ours_ND, head.w_DV)
    wanted, slopes = jax.value_and_grad(plain, argnums=(0, 1))(ours_ND, head.w_DV)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for ours, theirs in zip(got, slopes, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    logits = [
        np.asarray(h, np.float64) @ np.asarray(w, np.float64)
        for h, w in ((ours_ND, head.w_DV), (theirs_ND, other.w_DV))
    ]
    log_q, log_p = log_softmax(logits[0][:, :V] / 2), log_softmax(logits[1][:, :U] / 2)
    if name in EXACT:
        factor = 2 if name == "total_variation" else 4
        assert float(parts["kd"]) == pytest.approx(
            factor * (WEIGHTS[::-1] * EXACT[name](log_q, onto(log_p))).sum(), rel=1e-4
        )
    same = logits[0][:, :V].argmax(1) == onto(log_softmax(logits[1][:, :U])).argmax(1)
    assert float(parts["agreement"]) == pytest.approx((WEIGHTS[::-1] * same).sum(), abs=1e-6)


def test_all_of_the_teachers_mass_is_somewhere():
    rng = np.random.default_rng(3)
    log_p = log_softmax(4 * rng.standard_normal((50, U)))
    found = projected(jnp.asarray(log_p, jnp.float32), jnp.asarray(STUDENT_OF[:U]), V + 1)
    np.testing.assert_allclose(np.exp(found[:, :V]).sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[:, :V], onto(log_p), rtol=1e-4)
    assert (np.exp(found[:, V]) < 1e-30).all()


@pytest.mark.parametrize("mesh", [None, {"data": 4, "tensor": 2}], ids=str)
def test_what_is_made_of_log_likelihoods_is_differentiated_in_chunks(mesh):
    (hidden_ND, _), (head, _), targets_N = models()
    shard = placement(MeshConfig(**mesh), jax.devices()).shard_loss if mesh else None
    objective = ObjectiveConfig(chunk_tokens=5)

    def ours(hidden_ND, head):
        given = (hidden_ND, head, targets_N, objective, *([shard] if shard else []))
        return (log_likelihoods(*given).reshape(4, -1).sum(1) ** 2).sum()

    def plain(hidden_ND, head):
        logs_NV = jax.nn.log_softmax((hidden_ND @ head.w_DV)[:, :V])
        return (logs_NV[jnp.arange(N), targets_N].reshape(4, -1).sum(1) ** 2).sum()

    value, got = jax.value_and_grad(ours, argnums=(0, 1))(hidden_ND, head)
    wanted, slopes = jax.value_and_grad(plain, argnums=(0, 1))(hidden_ND, head)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)
    logs = np.asarray(target_log_probs(hidden_ND, head, targets_N, objective))
    assert logs.shape == (N,) and (logs < 0).all()


def test_what_wants_one_vocabulary_is_refused():
    (ours_ND, theirs_ND), (head, other), targets_N = models()
    given = targets_N, jnp.asarray(WEIGHTS), jnp.asarray(WEIGHTS)
    across = Signal(theirs_ND, other, {}, jnp.asarray(STUDENT_OF))
    for name in ("mse", "alm", "sampled_reverse_kl"):
        with pytest.raises(
            UserError, match="cannot be had token by token of a teacher with another tokenizer; use alm"
        ):
            fused_kd_loss(ours_ND, head, across, *given, ObjectiveConfig(divergence=name))
    plain = Signal(theirs_ND, Head(head.w_DV, vocab_size=V))
    with pytest.raises(UserError, match="uld is of a teacher with another tokenizer; set data.teacher_tokenizer"):
        fused_kd_loss(ours_ND, head, plain, *given, ObjectiveConfig(divergence="uld"))
    with pytest.raises(UserError, match="a divergence compares one vocabulary"):
        fused_kd_loss(ours_ND, head, Signal(theirs_ND, other), *given, ObjectiveConfig())
    mixture = Mixture((plain, plain), jnp.array([0.5, 0.5]))
    with pytest.raises(UserError, match="set data.teacher_tokenizer"):
        fused_kd_loss(ours_ND, head, mixture, *given, ObjectiveConfig(divergence="uld"))
    with pytest.raises(UserError, match="alm compares chunks of text"):
        ObjectiveConfig(terms=(Term("alm"), Term("forward_kl")))
