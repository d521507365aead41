"""Every divergence against float64 numpy, in value and gradient. A new row of DIVERGENCES gets a row in EXACT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.losses import DIVERGENCES


def _log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def _reverse_gradient(s, t):
    d, q = s - t, np.exp(s)
    return q * (d - (q * d).sum(-1, keepdims=True))


EXACT = {
    "forward_kl": (lambda s, t: _kl(t, s), lambda s, t: np.exp(s) - np.exp(t)),
    "reverse_kl": (lambda s, t: _kl(s, t), _reverse_gradient),
}
"""Name -> value and gradient with respect to the student's logits, of float64 log-probabilities."""


def _loss(name):
    def loss_N(student_NV, teacher_NV):
        logs = jax.nn.log_softmax(student_NV), jax.nn.log_softmax(teacher_NV)
        return DIVERGENCES[name].function(*logs, lambda x: jnp.sum(x, -1))

    return loss_N


def test_every_row_has_an_exact_counterpart():
    assert set(EXACT) == set(DIVERGENCES)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_value_and_gradient_against_float64(name, scale):
    rng = np.random.default_rng(0)
    student, teacher = (scale * rng.standard_normal((2, 16, 301))).astype(np.float32)
    value, gradient = EXACT[name]
    s, t = _log_softmax(student), _log_softmax(teacher)
    np.testing.assert_allclose(_loss(name)(student, teacher), value(s, t), rtol=3e-5)
    got = jax.grad(lambda x: _loss(name)(x, teacher).sum())(student)
    np.testing.assert_allclose(got, gradient(s, t), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_trap_7_identical_logits_give_zero_on_a_large_vocabulary(name):
    logits = 3 * np.random.default_rng(1).standard_normal((2, 248_320)).astype(np.float32)
    loss_N = np.asarray(_loss(name)(logits, logits))
    assert np.all(loss_N == 0)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_tiny_divergences_keep_their_digits(name):
    """KL about 5e-9: the form that cancels is negative there."""
    rng = np.random.default_rng(2)
    teacher = rng.standard_normal((8, 1000)).astype(np.float32)
    student = teacher + (1e-4 * rng.standard_normal((8, 1000))).astype(np.float32)
    exact = EXACT[name][0](_log_softmax(student), _log_softmax(teacher))
    got = np.asarray(_loss(name)(student, teacher))
    assert exact.max() < 1e-7 and got.min() > 0
    np.testing.assert_allclose(got, exact, rtol=0.02)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_far_apart_logits_stay_finite(name):
    """Logits of ±60 at temperature 0.05 (trap 10): value and gradient are finite."""
    student = np.array([[60.0, -60.0, 0.0]], np.float32) / 0.05
    value, gradient = jax.value_and_grad(lambda x: _loss(name)(x, -student).sum())(student)
    assert np.isfinite(value) and np.all(np.isfinite(gradient)) and value > 1000


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(DIVERGENCES)), st.integers(0, 2**31), st.integers(2, 40), st.floats(0.001, 30))
def test_never_negative(name, seed, vocabulary, scale):
    student, teacher = (scale * np.random.default_rng(seed).standard_normal((2, 4, vocabulary))).astype(np.float32)
    assert np.asarray(_loss(name)(student, teacher)).min() >= -1e-6
