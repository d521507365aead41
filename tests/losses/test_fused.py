"""The fused loss against the plain one in float64, whatever the chunk, mesh, head or precision."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from module_text import COLLECTIVE, loops

from kdjax.errors import UserError
from kdjax.losses import DIVERGENCES, IMPLEMENTATIONS, ObjectiveConfig, fused, fused_kd_loss, head_logits
from kdjax.losses.sizes import COPIES, block_size, chunk_size, product_columns
from kdjax.shapes import Head, Signal
from kdjax.sharding import MeshConfig, placement

N, D, E, V = 48, 16, 24, 64


def _problem(seed=0, n=N, v=V, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: (scale * rng.standard_normal(shape)).astype(dtype)  # noqa: E731
    hidden, teacher = normal(n, D), normal(n, E)
    w, w_teacher = normal(D, v) / np.sqrt(D).astype(dtype), normal(E, v) / np.sqrt(E).astype(dtype)
    targets = rng.integers(0, v, n).astype(np.int32)
    ce, kd = rng.random(n) / n, rng.random(n) / n
    return hidden, w, teacher, w_teacher, targets, ce.astype(np.float32), kd.astype(np.float32)


def _fused(problem, objective, head=None, **options):
    """Return a function of (hidden, w, bias) and its start, for the fused loss."""
    hidden, w, teacher, w_teacher, targets, ce, kd = map(jnp.asarray, problem)
    head = head or {}
    bias = jnp.asarray(head.get("bias_V", jnp.zeros(w.shape[1])))
    fixed = {"vocab_size": w.shape[1]} | {k: v for k, v in head.items() if k != "bias_V"}
    signal = Signal(teacher, Head(w_teacher, vocab_size=fixed["vocab_size"]))

    def loss(hidden, w, bias):
        return fused_kd_loss(hidden, Head(w, bias, **fixed), signal, targets, ce, kd, objective, **options)

    return loss, (hidden, w, bias)


def _log_softmax64(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _plain64(problem, objective):
    """Return loss, d hidden and d w of α·CE + (1 − α)·T²·KL(teacher ‖ student), by hand in float64."""
    hidden, w, teacher, w_teacher, targets, ce, kd = (np.asarray(x, np.float64) for x in problem)
    targets, t, a = targets.astype(int), objective.temperature, objective.alpha
    rows = np.arange(len(targets))
    student, teacher_logits = hidden @ w, teacher @ w_teacher
    log_q = _log_softmax64(student)
    log_qt, log_pt = _log_softmax64(student / t), _log_softmax64(teacher_logits / t)
    kl = (np.exp(log_pt) * (log_pt - log_qt)).sum(-1)
    loss = a * (ce * -log_q[rows, targets]).sum() + (1 - a) * t * t * (kd * kl).sum()
    one_hot = np.zeros_like(student)
    one_hot[rows, targets] = 1
    d_logits = a * ce[:, None] * (np.exp(log_q) - one_hot)
    d_logits += (1 - a) * t * kd[:, None] * (np.exp(log_qt) - np.exp(log_pt))
    return loss, d_logits @ w.T, hidden.T @ d_logits


@pytest.mark.parametrize("chunk", [1, 7, 16, 48, 1000])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 2.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5)])
def test_value_and_gradient_against_float64(alpha, temperature, chunk):
    objective = ObjectiveConfig(alpha, temperature, chunk_tokens=chunk)
    loss, start = _fused(_problem(), objective)
    (value, _), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*start)
    exact, d_hidden, d_w = _plain64(_problem(), objective)
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], d_hidden, atol=1e-7)
    np.testing.assert_allclose(gradients[1], d_w, atol=1e-6)


def test_formula_of_the_field_to_the_letter():
    """α·CE + (1 − α)·T²·CE_soft is the logged loss plus (1 − α)·T² times the teacher's entropy at T."""
    objective = ObjectiveConfig(alpha=0.3, temperature=2.0)
    problem = _problem()
    loss, start = _fused(problem, objective)
    value, parts = loss(*start)
    hidden, w, teacher, w_teacher, targets, ce, kd = (np.asarray(x, np.float64) for x in problem)
    log_p, log_q = _log_softmax64(teacher @ w_teacher / 2), _log_softmax64(hidden @ w / 2)
    soft = 4 * (kd * -(np.exp(log_p) * log_q).sum(-1)).sum()
    hard = (ce * -_log_softmax64(hidden @ w)[np.arange(N), targets.astype(int)]).sum()
    entropy = 4 * (kd * -(np.exp(log_p) * log_p).sum(-1)).sum()
    np.testing.assert_allclose(0.3 * hard + 0.7 * soft, float(value) + 0.7 * entropy, rtol=1e-6)
    np.testing.assert_allclose([parts["ce"], parts["kd"]], [hard, soft - entropy], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_trap_1_gradient_is_temperature_times_the_difference(temperature):
    """With an identity head the hidden states are the logits: d = T·(p_s − p_t) at temperature T."""
    rng = np.random.default_rng(3)
    student, teacher = rng.standard_normal((2, 5, 9)).astype(np.float32)
    eye, weight = Head(jnp.eye(9), vocab_size=9), jnp.ones(5)
    objective = ObjectiveConfig(0.0, temperature)
    gradient = jax.grad(
        lambda h: fused_kd_loss(h, eye, Signal(teacher, eye), jnp.zeros(5, int), weight, weight, objective)[0]
    )(student)
    softmax = lambda x: np.exp(_log_softmax64(x.astype(np.float64) / temperature))  # noqa: E731
    np.testing.assert_allclose(gradient, temperature * (softmax(student) - softmax(teacher)), atol=1e-6)


def test_trap_2_rows_of_weight_0_change_nothing():
    """They may even hold NaN, as a layer before may make of padding."""
    problem = list(_problem())
    out = np.arange(N) % 3 == 0
    problem[5], problem[6] = np.where(out, 0, problem[5]), np.where(out, 0, problem[6])
    other = list(problem)
    for i in (0, 2):
        other[i] = np.where(out[:, None], np.nan, problem[i]).astype(np.float32)
    other[4] = np.where(out, 1, problem[4]).astype(np.int32)
    results = []
    for p in (problem, other):
        loss, start = _fused(p, ObjectiveConfig(0.3, 2.0, chunk_tokens=8))
        results.append(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*start))
    (first, parts), (dh, dw, db) = results[0]
    (second, _), (dh2, dw2, db2) = results[1]
    assert first == second and np.all(dh == dh2) and np.all(dw == dw2) and np.all(db == db2)
    assert np.all(np.asarray(dh)[out] == 0) and np.isfinite(parts["kd"])


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.03])
def test_trap_6_bf16_inputs_keep_float32_arithmetic(spread):
    """Down to a KL of about 0.005 the gradient of bf16 hidden states errs by less than 1 %."""
    hidden, w, teacher, w_teacher, targets, ce, kd = _problem(5, n=256, v=512)
    bf16 = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)  # noqa: E731
    w, w_teacher = bf16(w), bf16(np.vstack([w, np.zeros((E - D, 512), np.float32)]))
    hidden = bf16(hidden)
    noise = spread * np.random.default_rng(6).standard_normal(hidden.shape).astype(np.float32)
    teacher = bf16(np.hstack([hidden + noise, np.zeros((256, E - D), np.float32)]))
    problem = (hidden, w, teacher, w_teacher, targets, ce, kd)
    objective = ObjectiveConfig(0.0, chunk_tokens=64)
    exact, d_hidden, d_w = _plain64(problem, objective)
    low = [jnp.asarray(hidden, jnp.bfloat16), w, jnp.asarray(teacher, jnp.bfloat16), *problem[3:]]
    loss, (h, w_DV, bias) = _fused(low, objective)
    (value, _), (dh, dw) = jax.value_and_grad(loss, (0, 1), has_aux=True)(h, w_DV, bias)
    rms = lambda got, want: np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2) / np.mean(want**2))  # noqa: E731
    np.testing.assert_allclose(value, exact, rtol=5e-3)
    assert dw.dtype == jnp.float32 and dh.dtype == jnp.bfloat16
    assert rms(dw, d_w) < 0.01 and rms(dh.astype(jnp.float32), d_hidden) < 0.01


def test_trap_8_the_head_accumulates_in_float32():
    """bf16 hidden states and matrix with logits of about ±40, against float64."""
    rng = np.random.default_rng(8)
    hidden = jnp.asarray(rng.standard_normal((8, 1024)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((1024, 32)) * 1.25 / np.sqrt(1.0), jnp.bfloat16)
    exact = np.asarray(hidden, np.float64) @ np.asarray(w, np.float64)
    assert np.abs(exact).max() > 40
    np.testing.assert_allclose(head_logits(hidden, Head(w, vocab_size=32)), exact, atol=1e-3)


HEADS = {
    "bias": {"bias_V": np.linspace(-1, 1, V, dtype=np.float32)},
    "soft-cap and scale": {"soft_cap": 3.0, "scale": 0.7},
    "padded vocabulary": {"vocab_size": V - 5},
    "all": {"bias_V": np.linspace(-1, 1, V, dtype=np.float32), "soft_cap": 3.0, "scale": 0.7, "vocab_size": V - 5},
}


@pytest.mark.parametrize("name", sorted(HEADS))
def test_traps_12_and_19_heads_of_every_kind_chunked_as_whole(name):
    """A padded, biased, capped head gives what plain autodiff on its real columns gives."""
    head = HEADS[name]
    v = head.get("vocab_size", V)
    hidden, w, teacher, w_teacher, targets, ce, kd = _problem(2)
    targets = targets % v
    problem = (hidden, w, teacher, w_teacher, targets, ce, kd)

    def plain(hidden, w, bias):
        student = hidden @ w[:, :v] + bias[:v]
        student = student * head.get("scale", 1.0)
        if "soft_cap" in head:
            student = head["soft_cap"] * jnp.tanh(student / head["soft_cap"])
        log_q, log_p = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher @ w_teacher[:, :v])
        hard = -jnp.take_along_axis(log_q, targets[:, None], 1)[:, 0]
        return jnp.sum(0.3 * ce * hard + 0.7 * kd * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    loss, start = _fused(problem, ObjectiveConfig(0.3, chunk_tokens=10), head)
    (value, _), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*start)
    with jax.numpy_rank_promotion("allow"):
        exact, wanted = jax.value_and_grad(plain, (0, 1, 2))(*start)
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-7)


def test_trap_12_heads_padded_to_different_widths():
    """Equal real vocabularies, padded to 64 by the student and to 80 by the teacher."""
    hidden, w, teacher, _, targets, ce, kd = _problem(4)
    _, _, _, wide, _, _, _ = _problem(4, v=80)
    objective, targets = ObjectiveConfig(0.3), targets % 60
    values = [
        fused_kd_loss(hidden, Head(jnp.asarray(a), vocab_size=60), Signal(teacher, Head(jnp.asarray(b), vocab_size=60)),
                      targets, ce, kd, objective)[0]
        for a, b in ((w, wide), (w[:, :60], wide[:, :60]))
    ]  # fmt: skip
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)


SETTINGS = {
    "alone": {},
    "factor off": {"temperature": 0.5, "scaled": False},
    "standardised": {"temperature": 2.0, "standardise": True},
}


FEW = ("adaptive_kl", "forward_kl", "jsd", "mse")
"""Divergences that stand for all where there is no time for all; the others are tested among the slow ones."""


def _every_divergence(few=FEW):
    return [pytest.param(x, marks=() if x in few else pytest.mark.slow) for x in sorted(DIVERGENCES)]


@pytest.mark.parametrize(
    "name", ["alone", *(pytest.param(x, marks=pytest.mark.slow) for x in SETTINGS if x != "alone")]
)
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_chunked_equals_the_reference(divergence, name):
    """Value, parts and gradients of every divergence, on a biased, capped and padded head; V and N are odd."""
    problem, results = _problem(2, n=37, v=61), []
    head = HEADS["all"] | {"bias_V": np.linspace(-1, 1, 61, dtype=np.float32), "vocab_size": 59}
    problem = (*problem[:4], problem[4] % 59, *problem[5:])
    for implementation in IMPLEMENTATIONS:
        objective = ObjectiveConfig(
            0.3, divergence=divergence, chunk_tokens=5, implementation=implementation, **SETTINGS[name]
        )
        loss, start = _fused(problem, objective, head)
        results.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*start))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("divergence", _every_divergence())
def test_bf16_gradients_are_those_of_float32_on_the_same_inputs(divergence):
    """Within 0.5 % (relative RMS), for logits of standard deviation 1 and 0.1; and no divergence is negative."""
    rng, n, width, v = np.random.default_rng(7), 64, 32, 257
    bf16 = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    for deviation in (1.0, 0.1):
        hidden, teacher = bf16(rng.standard_normal((2, n, width)))
        w, w_teacher = bf16(deviation * rng.standard_normal((2, width, v)) / np.sqrt(width))
        # Total variation's gradient jumps where two probabilities meet, in any dtype: such tokens are left out.
        sides_NV = [
            np.asarray(h, np.float64) @ np.asarray(m, np.float64) for h, m in ((hidden, w), (teacher, w_teacher))
        ]
        student_NV, teacher_NV = (side - np.logaddexp.reduce(side, axis=1, keepdims=True) for side in sides_NV)
        weight = jnp.asarray(np.abs(student_NV - teacher_NV).min(axis=1) > 1e-5, jnp.float32) / n
        assert jnp.count_nonzero(weight) > n // 2
        objective = ObjectiveConfig(0.0, divergence=divergence, chunk_tokens=16)

        def loss(hidden, w, teacher, w_teacher=w_teacher, weight=weight, objective=objective):
            signal = Signal(teacher, Head(w_teacher.astype(jnp.float32), vocab_size=v))
            return fused_kd_loss(hidden, Head(w, vocab_size=v), signal, jnp.arange(n), weight, weight, objective)[0]

        low, high = (
            jax.value_and_grad(loss, (0, 1))(hidden.astype(dtype), w.astype(jnp.float32), teacher.astype(dtype))
            for dtype in (jnp.bfloat16, jnp.float32)
        )
        assert low[0] >= 0
        for got, want in zip(low[1], high[1], strict=True):
            got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
            assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 5e-3


def test_masked_equals_sliced_and_order_does_not_matter():
    problem, objective = list(_problem(3)), ObjectiveConfig(0.4, 2.0, "jsd", chunk_tokens=7)
    keep = np.random.default_rng(0).random(N) < 0.4
    problem[5], problem[6] = np.where(keep, problem[5], 0), np.where(keep, problem[6], 0)
    order = np.random.default_rng(1).permutation(np.flatnonzero(keep))
    sliced = [x[order] if len(x) == N else x for x in problem]
    (whole, parts), (dh, dw) = _differentiated(problem, objective)
    (some, parts_of_some), (dh_some, dw_some) = _differentiated(sliced, objective)
    np.testing.assert_allclose(whole, some, rtol=1e-6)
    np.testing.assert_allclose(dh[order], dh_some, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(dw, dw_some, rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(dh)[~keep] == 0)
    for name, value in parts.items():
        np.testing.assert_allclose(value, parts_of_some[name], rtol=2e-6)


def _differentiated(problem, objective, **options):
    loss, (hidden, w, bias) = _fused(problem, objective, **options)
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, w, bias)


def test_tokens_of_no_weight_at_all_give_zero():
    problem = (*_problem()[:5], np.zeros(N, np.float32), np.zeros(N, np.float32))
    (loss, parts), gradients = _differentiated(problem, ObjectiveConfig(0.3, chunk_tokens=8))
    assert loss == 0 and all(value == 0 for value in parts.values()) and all(np.all(g == 0) for g in gradients)


@pytest.fixture
def chunks(monkeypatch):
    """Return a list that every chunk which is computed, on any device, adds its number of tokens to."""
    computed, of_chunk = [], fused._chunk

    def counted(*given):
        jax.debug.callback(lambda x: computed.append(len(x)), given[-1].targets_N)
        return of_chunk(*given)

    monkeypatch.setattr(fused, "_chunk", counted)
    return computed


@pytest.mark.parametrize(("live", "wanted"), [(0, 0), (1, 1), (8, 1), (9, 2), (N, N // 8)])
def test_chunks_without_weight_are_not_computed(chunks, live, wanted):
    problem = list(_problem())
    is_live = np.random.default_rng(0).permutation(N) < live
    problem[5], problem[6] = (np.where(is_live, weight, 0) for weight in problem[5:])
    jax.block_until_ready(jax.jit(partial(_differentiated, problem, ObjectiveConfig(0.3, chunk_tokens=8)))())
    jax.effects_barrier()
    assert chunks == [8] * wanted


def test_auto_takes_what_the_memory_budget_holds():
    objective = ObjectiveConfig()
    sizes = [chunk_size(objective, 10**6, v, backend) for v, backend in ((49_152, "cpu"), (128_256, "cpu"))]
    assert sizes == [1344, 512] and chunk_size(objective, 10**6, 128_256, "gpu") == 1024
    assert chunk_size(objective, 100, 128_256, "gpu") == 100
    assert chunk_size(objective, 1000, 1000) == 256 and chunk_size(objective, 8192, 1000) == 1024
    row = 4 * 50_000 * COPIES
    for mib in (200, 1000):
        tokens = chunk_size(ObjectiveConfig(chunk_mib=mib), 10**6, 50_000)
        assert tokens % 64 == 0 and tokens * row <= mib * 2**20 < (tokens + 64) * row
    assert chunk_size(ObjectiveConfig(chunk_mib=1), 10**6, 10**6) == 64


def test_blocks_divide_a_chunk_and_fit_the_caches_of_a_cpu():
    assert [block_size(512, v, "cpu") for v in (128_256, 49_152, 512, 10**7)] == [2, 4, 512, 1]
    assert block_size(7 * 11, 32_000, "cpu") == 7 and block_size(1024, 128_256, "gpu") == 512
    assert product_columns(576, 128_256, "cpu") == 10_922 and product_columns(576, 1000, "cpu") == 1000


@pytest.mark.parametrize(("rows", "columns"), [(1, V), (2, 24), (7, 32), (14, 1)])
def test_blocks_and_columns_change_nothing(monkeypatch, rows, columns):
    """Blocks of a chunk, and columns of dW's product with and without a rest, against the chunk as a whole."""
    problem, objective = _problem(4), ObjectiveConfig(0.4, 2.0, "jsd", chunk_tokens=14)
    loss, start = _fused(problem, objective, HEADS["all"])
    wanted = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*start)
    monkeypatch.setattr(fused, "block_size", lambda chunk, v: rows)
    monkeypatch.setattr(fused, "product_columns", lambda d, v: columns)
    found = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*start)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha_beta", "decoupled_kd"])
def test_memory_is_that_of_three_arrays_of_a_chunks_logits(divergence):
    """Both models' logits and the gradient; what the divergence needs besides is as large as a block."""
    chunk, v, block = 256, 16_384, 16
    loss, start = _fused(_problem(n=1024, v=v), ObjectiveConfig(0.4, 2.0, divergence, chunk_tokens=chunk))
    assert block_size(chunk, v, "cpu") == block
    compiled = jax.jit(jax.grad(lambda *a: loss(*a)[0], (0, 1))).lower(*start).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (3 * chunk + 20 * block) * v * 4


def test_parts_against_float64():
    """Agreement, confidences, entropies and cross entropies are of temperature 1, whatever the objective's is."""
    problem = _problem(9)
    hidden, w, teacher, w_teacher, targets, ce, kd = (np.asarray(x, np.float64) for x in problem)
    _, parts = _fused(problem, ObjectiveConfig(0.3, 4.0, chunk_tokens=7))[0](*map(jnp.asarray, problem[:2]), None)
    q, p, rows = _log_softmax64(hidden @ w), _log_softmax64(teacher @ w_teacher), np.arange(N)
    exact = {
        "ce": (ce * -q[rows, targets.astype(int)]).sum(),
        "teacher_ce": (ce * -p[rows, targets.astype(int)]).sum(),
        "agreement": (kd * (q.argmax(-1) == p.argmax(-1))).sum(),
        "student_confidence": (kd * np.exp(q.max(-1))).sum(),
        "teacher_confidence": (kd * np.exp(p.max(-1))).sum(),
        "student_entropy": (kd * -(np.exp(q) * q).sum(-1)).sum(),
        "teacher_entropy": (kd * -(np.exp(p) * p).sum(-1)).sum(),
    }
    assert set(parts) == {*exact, "kd"}
    for name, value in exact.items():
        np.testing.assert_allclose(parts[name], value, rtol=2e-6)


def test_evaluation_computes_no_gradient():
    loss, start = _fused(_problem(), ObjectiveConfig(0.3, chunk_tokens=8))
    count = lambda f: str(jax.make_jaxpr(f)(*start)).count("dot_general")  # noqa: E731
    assert count(lambda *a: loss(*a)[0]) == 2 and count(jax.grad(lambda *a: loss(*a)[0], (0, 1))) == 4


@pytest.mark.parametrize("divergence", _every_divergence())
@pytest.mark.parametrize(
    "mesh", [{"data": 4, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}], ids=str
)
def test_a_mesh_of_any_shape_gives_what_one_device_gives(mesh, divergence):
    objective = ObjectiveConfig(0.3, 2.0, divergence, chunk_tokens=4)
    alone, start = _fused(_problem(), objective, HEADS["all"])
    together, _ = _fused(_problem(), objective, HEADS["all"], shard=placement(MeshConfig(**mesh)).shard_loss)
    one, eight = (jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*start) for f in (alone, together))
    for got, want in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def _compiled(mesh, chunk, n=512, v=96):
    """Return loss and gradients as compiled, tokens spread over the batch axes, and what to call them with."""
    place, objective = placement(MeshConfig(**mesh)), ObjectiveConfig(0.3, 2.0, chunk_tokens=chunk)

    def loss(hidden, w, teacher, w_teacher, targets, ce, kd):
        head, signal = Head(w, vocab_size=v), Signal(teacher, Head(w_teacher, vocab_size=v))
        return fused_kd_loss(hidden, head, signal, targets, ce, kd, objective, shard=place.shard_loss)[0]

    problem = [jnp.asarray(x) for x in _problem(n=n, v=v)]
    where = [
        place.sharding(("batch",) + (None,) * (x.ndim - 1) if x.shape[0] == n else (None, None), x.shape)
        for x in problem
    ]
    compiled = jax.jit(jax.grad(loss, (0, 1)), in_shardings=where).lower(*problem).compile()
    return compiled, jax.device_put(problem, where)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "context": 4}], ids=str)
def test_trap_26_each_device_runs_its_own_chunks_and_gathers_no_tokens(chunks, mesh):
    """512 tokens in chunks of 16 on 8 devices: 32 chunks are computed, and nothing crosses devices inside."""
    compiled, problem = _compiled(mesh, 16)
    jax.block_until_ready(compiled(*problem))
    jax.effects_barrier()
    assert chunks == [16] * (512 // 16)
    module = compiled.as_text()
    assert any(re.search(r"f32\[16,96\]", body) for body in loops(module))
    assert not any(re.search(COLLECTIVE, body) for body in loops(module))
    assert re.search(r"all-reduce", module), "dW is summed once, after the loop"
    assert not re.search(r"all-gather", module) and not re.search(r"\[512,(16|24)\]", module)


def test_a_vocabulary_on_eight_devices_sends_figures_of_tokens_alone():
    """Nothing is gathered; inside the loop each all-reduce is of one number a token, after it dh is summed once."""
    module = _compiled({"data": 1, "tensor": 8}, 16, n=64)[0].as_text()
    inside = [found for body in loops(module) for found in re.findall(COLLECTIVE, body)]
    assert inside and {kind for _, kind in inside} == {"all-reduce"}
    assert all(set(re.findall(r"\w+\[([\d,]*)\]", shapes)) <= {"16", ""} for shapes, _ in inside)
    assert {kind for _, kind in re.findall(COLLECTIVE, module)} == {"all-reduce"}


def test_no_logits_of_all_tokens_exist():
    module = _compiled({"data": 8}, 16, n=512, v=96)[0].as_text()
    assert re.search(r"f32\[16,96\]", module), "a chunk's logits"
    assert not re.search(r"\[(512|64),96\]", module), "nobody's tokens all at once"


def test_no_signal_is_the_cross_entropy_alone():
    hidden, w, _, _, targets, ce, kd = _problem()
    value, parts = fused_kd_loss(
        jnp.asarray(hidden), Head(w, vocab_size=V), None, targets, ce, kd, ObjectiveConfig(0.1)
    )
    exact, _, _ = _plain64(_problem(), ObjectiveConfig(1.0))
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    assert set(parts) == {"ce"}


def test_trap_13_the_teacher_gets_no_gradient():
    hidden, w, teacher, w_teacher, targets, ce, kd = map(jnp.asarray, _problem())
    gradient = jax.grad(
        lambda t, wt: fused_kd_loss(
            hidden, Head(w, vocab_size=V), Signal(t, Head(wt, vocab_size=V)), targets, ce, kd, ObjectiveConfig(0.1)
        )[0],
        (0, 1),
    )(teacher, w_teacher)
    assert all(np.all(np.asarray(g) == 0) for g in gradient)


def test_vocabularies_and_shapes_that_differ_are_named():
    hidden, w, teacher, w_teacher, targets, ce, kd = map(jnp.asarray, _problem())
    signal = Signal(teacher, Head(w_teacher[:, :60], vocab_size=60))
    with pytest.raises(UserError, match="student vocabulary 64, teacher vocabulary 60"):
        fused_kd_loss(hidden, Head(w, vocab_size=V), signal, targets, ce, kd, ObjectiveConfig())
    with pytest.raises(UserError, match="N is 48 in student_hidden_ND but 10 in targets_N"):
        fused_kd_loss(hidden, Head(w, vocab_size=V), None, targets[:10], ce, kd, ObjectiveConfig())
