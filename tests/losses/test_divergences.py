"""Every divergence against float64 numpy, in value and gradient. A new row of DIVERGENCES gets a row in EXACT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_cases import log_softmax, loss_of, targets, value_and_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.losses import DIVERGENCES, choose


def _kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def _pull(s, g):
    """Return the gradient with respect to logits of what has the gradient p_s·g with respect to log p_s."""
    q = np.exp(s)
    return q * (g - (q * g).sum(-1, keepdims=True))


def _mix(t, s, share):
    return np.logaddexp(np.log(share) + t, np.log1p(-share) + s)


def _jsd(s, t, beta):
    m = _mix(t, s, beta)
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m), _pull(s, (1 - beta) * (s - m))


def _interpolated_jsd(s, t, beta):
    m = _mix(t, s, beta)
    changed = ((1 - beta) * np.exp(t) + beta * np.exp(s)) / np.exp(m)
    return (1 - beta) * _kl(t, m) + beta * _kl(s, m), _pull(s, beta * (s - m) - (1 - beta) * changed)


def _skewed_forward_kl(s, t, skew):
    m = _mix(t, s, skew)
    return _kl(t, m), _pull(s, -(1 - skew) * np.exp(t - m))


def _skewed_reverse_kl(s, t, skew):
    m = _mix(s, t, skew)
    return _kl(s, m), _pull(s, s - m - skew * np.exp(s - m))


def _alpha_beta(s, t, alpha, beta):
    """As Cichocki et al. 2011 define it, eq. 19 case by case."""
    p, q, total = np.exp(t), np.exp(s), alpha + beta
    if total == 0:
        terms = 0.5 * (t - s) ** 2
    elif beta == 0:
        terms = (alpha * p**alpha * (t - s) - p**alpha + q**alpha) / alpha**2
    elif alpha == 0:
        terms = (beta * q**beta * (s - t) - q**beta + p**beta) / beta**2
    else:
        terms = p**total / (beta * total) + q**total / (alpha * total) - p**alpha * q**beta / (alpha * beta)
    g = q**beta * ((q**alpha - p**alpha) / alpha if alpha else s - t)
    return terms.sum(-1), g - q * g.sum(-1, keepdims=True)


def _adaptive_kl(s, t, head):
    """With a sort, as the paper has it."""
    p, gap = np.exp(t), np.abs(np.exp(t) - np.exp(s))
    order = np.argsort(-p, -1)
    in_head = np.cumsum(np.take_along_axis(p, order, -1), -1) <= head
    in_head[:, 0] = True
    share = (np.take_along_axis(gap, order, -1) * in_head).sum(-1) / gap.sum(-1)
    gradient = share[:, None] * (np.exp(s) - p) + (1 - share[:, None]) * _pull(s, s - t)
    return share * _kl(t, s) + (1 - share) * _kl(s, t), gradient


def _decoupled_kd(s, t, alpha, beta):
    chosen = np.arange(s.shape[-1]) == targets(*s.shape)[:, None]

    def split(x):
        rest = np.log(np.exp(np.where(chosen, -np.inf, x)).sum(-1))
        return x[chosen], rest, np.where(chosen, -np.inf, x - rest[:, None])

    (s_target, s_rest, s_others), (t_target, t_rest, t_others) = split(s), split(t)
    binary = np.exp(t_target) * (t_target - s_target) + np.exp(t_rest) * (t_rest - s_rest)
    r_s, r_t = np.exp(s_others), np.exp(t_others)
    others = (r_t * np.where(chosen, 0, t - t_rest[:, None] - s + s_rest[:, None])).sum(-1)
    lead = (np.exp(t_target) - np.exp(s_target))[:, None]
    return alpha * binary + beta * others, alpha * lead * np.where(chosen, -1, r_s) + beta * (r_s - r_t)


def _hard_cross_entropy(s, t):
    chosen = np.arange(s.shape[-1]) == t.argmax(-1)[:, None]
    return -(chosen * s).sum(-1), np.exp(s) - chosen


def _cosine(s, t):
    norm_s, norm_t = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (s, t))
    cos = (s / norm_s * t / norm_t).sum(-1, keepdims=True)
    return 1 - cos[:, 0], (cos * s / norm_s - t / norm_t) / norm_s


EXACT = {
    "forward_kl": lambda s, t: (_kl(t, s), np.exp(s) - np.exp(t)),
    "reverse_kl": lambda s, t: (_kl(s, t), _pull(s, s - t)),
    "symmetric_kl": lambda s, t: ((_kl(s, t) + _kl(t, s)) / 2, (_pull(s, s - t) + np.exp(s) - np.exp(t)) / 2),
    "jsd": _jsd,
    "interpolated_jsd": _interpolated_jsd,
    "skewed_forward_kl": _skewed_forward_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
    "total_variation": lambda s, t: (np.abs(np.exp(s) - np.exp(t)).sum(-1) / 2, _pull(s, np.sign(s - t) / 2)),
    "alpha_beta": _alpha_beta,
    "adaptive_kl": _adaptive_kl,
    "decoupled_kd": _decoupled_kd,
    "soft_cross_entropy": lambda s, t: (-(np.exp(t) * s).sum(-1), np.exp(s) - np.exp(t)),
    "hard_cross_entropy": _hard_cross_entropy,
    "mse": lambda s, t: (((s - t) ** 2).mean(-1), 2 * (s - t) / s.shape[-1]),
    "cosine": _cosine,
}
"""Name -> value and gradient with respect to the student's logits, of float64 log-probabilities (or logits)."""

OTHERS = (
    *("jsd(beta=0.05)", "jsd(beta=0.9)", "interpolated_jsd(beta=0.05)", "interpolated_jsd(beta=0.9)"),
    *("skewed_forward_kl(skew=0.01)", "skewed_forward_kl(skew=0.9)"),
    *("skewed_reverse_kl(skew=0.01)", "skewed_reverse_kl(skew=0.9)"),
    *(f"alpha_beta(alpha={a}, beta={b})" for a, b in ((1, 0), (0, 1), (0, 0), (0.5, 0), (0, 0.3), (0.7, 0.2), (2, 1))),
    *("alpha_beta(alpha=0.001, beta=0.001)", "alpha_beta(alpha=1, beta=0.0001)", "alpha_beta(alpha=0.0001, beta=1)"),
    *("adaptive_kl(head=0.05)", "adaptive_kl(head=0.97)", "decoupled_kd(alpha=0, beta=1)"),
)
TEXTS = (*DIVERGENCES, *OTHERS)
KEPT_AT_EQUALITY = ("soft_cross_entropy", "hard_cross_entropy")
BOUNDED = {
    "jsd": np.log(2),
    "interpolated_jsd": np.log(2),
    "skewed_forward_kl": -np.log(0.1),
    "skewed_reverse_kl": -np.log(0.1),
    "total_variation": 1,
    "alpha_beta": 1 / (0.2 * 0.9) + 1 / (0.7 * 0.9),
    "cosine": 2,
}
"""What those with an upper bound say of distributions that have nothing in common; others say more than 1000."""


def exact(text, student_NV, teacher_NV):
    """Return value and gradient in float64, from logits."""
    name, row, parameters = choose(text)
    if row.of == "logits":
        return EXACT[name](student_NV.astype(np.float64), teacher_NV.astype(np.float64))
    return EXACT[name](log_softmax(student_NV), log_softmax(teacher_NV), **dict(parameters))


def test_every_row_has_an_exact_counterpart():
    assert set(EXACT) == set(DIVERGENCES)


def test_every_parameter_is_tried_away_from_its_default():
    tried = {(choose(text).name, key) for text in OTHERS for key, _ in choose(text).parameters}
    assert tried == {(name, key) for name, row in DIVERGENCES.items() for key in row.parameters}


@pytest.mark.parametrize("text", TEXTS)
def test_value_and_gradient_against_float64(text):
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0, 8.0):
        student, teacher = (scale * rng.standard_normal((2, 16, 301))).astype(np.float32)
        value, gradient = exact(text, student, teacher)
        got_value, got_gradient = value_and_gradient(text, student, teacher)
        np.testing.assert_allclose(got_value, value, rtol=3e-5)
        np.testing.assert_allclose(got_gradient, gradient, atol=2e-6 * max(1, np.abs(gradient).max()), rtol=2e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_trap_7_identical_logits_give_zero_on_a_large_vocabulary(text):
    logits = 3 * np.random.default_rng(1).standard_normal((2, 248_320)).astype(np.float32)
    loss_N, gradient_NV = value_and_gradient(text, logits, logits)
    if text in KEPT_AT_EQUALITY:
        np.testing.assert_allclose(loss_N, exact(text, logits, logits)[0], rtol=1e-5)
    else:
        assert np.all(np.abs(loss_N) <= (1e-12 if text == "cosine" else 0)) and np.abs(gradient_NV).max() < 1e-6


@pytest.mark.parametrize("text", sorted({*TEXTS} - {*KEPT_AT_EQUALITY}))
def test_tiny_divergences_keep_their_digits(text):
    """A KL about 5e-9: the form that cancels is negative there."""
    rng = np.random.default_rng(2)
    teacher = rng.standard_normal((8, 1000)).astype(np.float32)
    student = teacher + (1e-4 * rng.standard_normal((8, 1000))).astype(np.float32)
    value, gradient = exact(text, student, teacher)
    got_value, got_gradient = value_and_gradient(text, student, teacher)
    assert got_value.min() > 0
    np.testing.assert_allclose(got_value, value, rtol=0.02)
    if text != "total_variation":  # whose gradient jumps where p_s = p_t
        np.testing.assert_allclose(got_gradient, gradient, atol=5e-6)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_trap_10_far_apart_logits_stay_finite(name):
    """Logits of ±60 at temperature 0.05: value and gradient are finite, and the value is right."""
    student = np.array([[60.0, -60.0, 0.0]], np.float32) / 0.05
    value, gradient = value_and_gradient(name, student, -student)
    assert np.all(np.isfinite(gradient)) and np.isfinite(value)
    if name in BOUNDED:
        np.testing.assert_allclose(value, BOUNDED[name], rtol=1e-6)
    else:
        assert value > 1000


@pytest.mark.parametrize("text", TEXTS)
def test_trap_10_padded_entries_change_nothing(text):
    """A vocabulary with entries of no probability: the same value, the same gradient, and none on the padding."""
    rng = np.random.default_rng(3)
    for temperature in (1.0, 0.05):
        student, teacher = (rng.standard_normal((2, 4, 30)) / temperature).astype(np.float32)
        nothing = 0.0 if choose(text).row.of == "logits" else np.float32(-1e30 / temperature)
        padded = [np.pad(x, [(0, 0), (0, 7)], constant_values=nothing) for x in (student, teacher)]
        value, gradient = value_and_gradient(text, student, teacher)
        got_value, got_gradient = value_and_gradient(text, *padded, vocab_size=30)
        np.testing.assert_allclose(got_value, value, rtol=1e-5)
        np.testing.assert_allclose(
            got_gradient[:, :30], gradient, rtol=1e-5, atol=2e-7 * max(1, np.abs(gradient).max())
        )
        assert np.all(got_gradient[:, 30:] == 0)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_the_factor_keeps_the_gradient_as_temperature_grows(name):
    """Hot distributions differ by 1/T, and the chain rule has another 1/T: T² for what is quadratic, T for linear."""
    row = DIVERGENCES[name]
    student, teacher = np.random.default_rng(4).standard_normal((2, 4, 50)).astype(np.float32)
    sizes = []
    for t in (50.0, 100.0):
        gradient = jax.grad(lambda x, t=t: loss_of(name)(x / t, teacher / t).sum())(jnp.asarray(student))
        sizes.append(float(jnp.linalg.norm(gradient)) * row.factor(t))
    without = {"mse": 4, "cosine": 1, "hard_cross_entropy": 2}  # none: it falls with T, as documented
    assert sizes[0] / sizes[1] == pytest.approx(without.get(name, 1), rel=0.03)
    if name in without:
        assert row.factor(7.0) == 1


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TEXTS), st.integers(0, 2**31), st.sampled_from([2, 3, 17, 40]), st.floats(-7, 1.5))
def test_never_negative(text, seed, vocabulary, magnitude):
    """Down to differences that are all rounding."""
    rng = np.random.default_rng(seed)
    teacher = 3 * rng.standard_normal((4, vocabulary))
    student = teacher + 10**magnitude * rng.standard_normal((4, vocabulary))
    loss_N = loss_of(text)(jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32))
    assert np.asarray(loss_N).min() >= 0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted({*TEXTS} - {*KEPT_AT_EQUALITY})), st.integers(0, 2**31), st.floats(0.001, 100))
def test_zero_at_equal_distributions_and_above_it_elsewhere(text, seed, scale):
    logits = (scale * np.random.default_rng(seed).standard_normal((4, 23))).astype(np.float32)
    assert np.all(np.asarray(loss_of(text)(logits, logits)) == 0)
    if scale < 3:  # beyond that the others may have no mass left in float32
        assert np.asarray(loss_of(text)(logits, logits[:, ::-1])).min() > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 30))
def test_soft_cross_entropy_is_the_entropy_at_equality_and_more_elsewhere(seed, scale):
    student, teacher = (scale * np.random.default_rng(seed).standard_normal((2, 4, 23))).astype(np.float32)
    t = log_softmax(teacher)
    entropy = -(np.exp(t) * t).sum(-1)
    np.testing.assert_allclose(loss_of("soft_cross_entropy")(teacher, teacher), entropy, rtol=1e-4, atol=1e-6)
    above = np.asarray(loss_of("soft_cross_entropy")(student, teacher))
    np.testing.assert_allclose(above, entropy + _kl(t, log_softmax(student)), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-50, 50), st.floats(0.01, 100))
def test_mse_and_cosine_have_their_own_invariances(seed, shift, scale):
    student, teacher = np.random.default_rng(seed).standard_normal((2, 4, 23)).astype(np.float32)
    mse, cosine = loss_of("mse"), loss_of("cosine")
    np.testing.assert_allclose(mse(student + shift, teacher + shift), mse(student, teacher), rtol=1e-3)
    np.testing.assert_allclose(cosine(scale * student, teacher), cosine(student, teacher), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(cosine(scale * student, student), 0, atol=1e-10)
