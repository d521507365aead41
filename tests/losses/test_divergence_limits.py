"""Limits and bounds of divergences, and how one is chosen by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergence_cases import log_softmax, loss_of, sum_V, targets, value_and_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from kdjax.errors import UserError
from kdjax.losses import DIVERGENCES, choose, terms


def _two(seed=0, scale=1.0, shape=(6, 40)):
    return (scale * np.random.default_rng(seed).standard_normal((2, *shape))).astype(np.float32)


def _kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def _forward_and_reverse(student, teacher):
    s, t = log_softmax(student), log_softmax(teacher)
    q = np.exp(s)
    forward, reverse = q - np.exp(t), q * (s - t - _kl(s, t)[:, None])
    return (_kl(t, s), forward), (_kl(s, t), reverse)


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize(
    ("text", "divided_by", "reverse"),
    [
        ("jsd(beta=1e-4)", 1e-4, False),
        ("jsd(beta=0.9999)", 1e-4, True),
        ("interpolated_jsd(beta=1e-6)", 1, False),
        ("interpolated_jsd(beta=0.999999)", 1, True),
        ("skewed_forward_kl(skew=1e-6)", 1, False),
        ("skewed_reverse_kl(skew=1e-6)", 1, True),
        ("alpha_beta(alpha=1, beta=0)", 1, False),
        ("alpha_beta(alpha=0, beta=1)", 1, True),
        ("alpha_beta(alpha=1, beta=1e-6)", 1, False),
        ("alpha_beta(alpha=1e-6, beta=1)", 1, True),
    ],
)
def test_trap_9_both_ends_are_the_kls(text, divided_by, reverse, scale):
    student, teacher = _two(1, scale)
    value, gradient = _forward_and_reverse(student, teacher)[reverse]
    got_value, got_gradient = value_and_gradient(text, student, teacher)
    np.testing.assert_allclose(got_value / divided_by, value, rtol=5e-3)
    np.testing.assert_allclose(got_gradient / divided_by, gradient, atol=5e-3 * np.abs(gradient).max())


@pytest.mark.parametrize(("alpha", "beta"), [(0, 0), (0.3, 0), (0, 0.3), (1, 0), (0, 1)])
def test_alpha_beta_is_continuous_at_its_limits(alpha, beta):
    student, teacher = _two(2)
    at = value_and_gradient(f"alpha_beta(alpha={alpha}, beta={beta})", student, teacher)
    for step in (1e-4, 1e-6, 1e-12, 2e-38, 1e-40):
        beside = value_and_gradient(f"alpha_beta(alpha={alpha + step}, beta={beta + step})", student, teacher)
        for got, wanted in zip(beside, at, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("text", ["jsd(beta=1e-30)", "jsd(beta=0.9999999999)", "skewed_forward_kl(skew=1e-30)"])
def test_ends_that_float32_cannot_tell_from_0_and_1_stay_finite(text):
    student, teacher = _two(3, 30.0)
    value, gradient = value_and_gradient(text, student, teacher)
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient))


def test_terms_are_not_negative_where_all_is_rounding():
    rng = np.random.default_rng(9)
    p = np.full(100_000, -0.5, np.float32)
    q = p - (10 ** rng.uniform(-8, -4, p.size) * rng.choice([-1, 1], p.size)).astype(np.float32)
    for share, weights in ((0.3, (0.3, 0.7)), (0.1, (0.0, 1.0)), (0.9, (1.0, 0.0))):
        assert float(jnp.min(jax.jit(terms.mixture_terms)(p, q, share, *weights)[1])) >= 0
    for of in (terms.kl_terms, terms.jeffreys_terms, lambda p, q: terms.alpha_beta_terms(p, q, 0.2, 0.7)):
        assert float(jnp.min(jax.jit(of)(p, q))) >= 0


def test_decoupled_kd_is_the_forward_kl_with_the_weights_that_this_has():
    student, teacher = _two(4, shape=(1, 20))
    target = np.exp(log_softmax(teacher))[0, targets(1, 20)[0]]
    value, gradient = _forward_and_reverse(student, teacher)[0]
    got_value, got_gradient = value_and_gradient(f"decoupled_kd(alpha=1, beta={1 - target})", student, teacher)
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    np.testing.assert_allclose(got_gradient, gradient, atol=1e-6)


def test_adaptive_kl_weighs_by_head_and_tail():
    """The teacher's head is its first token of 0.45; only there, or only elsewhere, do the two differ."""
    teacher = np.log([[0.45, 0.2, 0.2, 0.15]]).astype(np.float32)
    in_tail = np.log([[0.45, 0.3, 0.1, 0.15]]).astype(np.float32)
    np.testing.assert_allclose(loss_of("adaptive_kl")(in_tail, teacher), _kl(in_tail, teacher), rtol=1e-4)
    elsewhere = np.log([[0.25, 0.3, 0.25, 0.2]]).astype(
        np.float32
    )  # gaps 0.2 in the head, 0.1 + 0.05 + 0.05 in the tail
    half = (_kl(teacher, elsewhere) + _kl(elsewhere, teacher)) / 2
    np.testing.assert_allclose(loss_of("adaptive_kl")(elsewhere, teacher), half, rtol=1e-4)


def test_hard_cross_entropy_shares_ties():
    teacher, student = np.array([[2.0, 2.0, 0.0]], np.float32), np.array([[1.0, 0.0, -1.0]], np.float32)
    s = log_softmax(student)
    np.testing.assert_allclose(loss_of("hard_cross_entropy")(student, teacher), -(s[:, 0] + s[:, 1]) / 2, rtol=1e-6)


def test_cosine_bears_vectors_of_zeros():
    some, zeros = np.ones((1, 5), np.float32), np.zeros((1, 5), np.float32)
    for student, teacher, value in ((zeros, some, 0.5), (some, zeros, 0.5), (zeros, zeros, 0.0)):
        got, gradient = value_and_gradient("cosine", student, teacher)
        np.testing.assert_allclose(got, value, rtol=1e-6)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", sorted(name for name, row in DIVERGENCES.items() if row.pointwise))
def test_textbook_terms_sum_to_the_loss(name):
    student, teacher = _two(5, 2.0)
    terms_NV = loss_of(name, pointwise=True)(student, teacher)
    assert terms_NV.shape == student.shape
    np.testing.assert_allclose(terms_NV.sum(-1), loss_of(name)(student, teacher), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(name for name, row in DIVERGENCES.items() if row.pointwise))
def test_textbook_terms_have_the_gradient_of_the_loss_together(name):
    student, teacher = _two(5, 2.0)
    terms, whole = (
        jax.grad(lambda x, f=f: f(x, teacher).sum())(student) for f in (loss_of(name, pointwise=True), loss_of(name))
    )
    np.testing.assert_allclose(terms, whole, atol=2e-6)


def test_textbook_terms_are_the_textbooks():
    student, teacher = _two(6)
    s, t = log_softmax(student), log_softmax(teacher)
    m = np.log(0.1 * np.exp(t) + 0.9 * np.exp(s))
    for name, wanted in {
        "forward_kl": np.exp(t) * (t - s),
        "reverse_kl": np.exp(s) * (s - t),
        "skewed_forward_kl": np.exp(t) * (t - m),
        "symmetric_kl": (np.exp(t) - np.exp(s)) * (t - s) / 2,
    }.items():
        np.testing.assert_allclose(loss_of(name, pointwise=True)(student, teacher), wanted, atol=1e-6)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_the_vocabulary_may_lie_in_parts(name):
    """On each of two parts with joined sums: what is reduced is reduced by what was given, and nothing else is."""
    _, row, parameters = choose(name)
    student, teacher = _two(7, 2.0, (6, 40))
    chosen = np.arange(40) == targets(6, 40)[:, None]
    arrays = (student, teacher) if row.of == "logits" else (jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))

    def on_a_part(student_NV, teacher_NV, chosen_NV):
        given = {
            "is_target_NV": chosen_NV,
            "max_V": lambda x: lax.pmax(lax.stop_gradient(x.max(-1)), "parts"),
            "vocab_size": 40,
        }
        needed = {key: given[key] for key in row.needs}
        joined = lambda x: lax.psum(x.sum(-1), "parts")  # noqa: E731
        return row.function(student_NV, teacher_NV, joined, **needed, **dict(parameters))

    parts = [jnp.stack(jnp.split(jnp.asarray(x), 2, axis=1)) for x in (*arrays, chosen)]
    got = jax.vmap(on_a_part, axis_name="parts")(*parts)
    whole = loss_of(name)(student, teacher)
    for part in got:
        np.testing.assert_allclose(part, whole, rtol=1e-5)


def _buckets(log_NV, kept_NK):
    """Return the log-probabilities of the kept tokens and, last, of all others together."""
    others = np.ones(log_NV.shape, bool)
    np.put_along_axis(others, kept_NK, False, -1)
    tail = np.log(np.where(others, np.exp(log_NV), 0).sum(-1, keepdims=True))
    return np.concatenate([np.take_along_axis(log_NV, kept_NK, -1), tail], -1)


BUCKETS = [name for name, row in DIVERGENCES.items() if row.buckets]


def test_what_a_tail_bucket_bounds():
    assert set(DIVERGENCES) - set(BUCKETS) == {
        *("alpha_beta", "adaptive_kl", "decoupled_kd", "hard_cross_entropy", "mse", "cosine")
    }


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.sampled_from(BUCKETS), st.integers(0, 2**31), st.integers(1, 29), st.floats(0.01, 6), st.floats(0.01, 6))
def test_buckets_bound_from_below(name, seed, kept, student_scale, teacher_scale):
    rng = np.random.default_rng(seed)
    s, t = (
        log_softmax(student_scale * rng.standard_normal((4, 30))),
        log_softmax(teacher_scale * rng.standard_normal((4, 30))),
    )
    top = np.argsort(-t, -1)[:, :kept]
    _, row, parameters = choose(name)

    def loss(student, teacher):
        return row.function(jnp.float32(student), jnp.float32(teacher), sum_V, **dict(parameters))

    whole, coarse = loss(s, t), loss(_buckets(s, top), _buckets(t, top))
    assert np.all(np.asarray(coarse) <= np.asarray(whole) * (1 + 1e-4) + 1e-6)


@pytest.mark.parametrize("name", BUCKETS)
def test_trap_5_a_student_with_nothing_on_the_top_k(name):
    """Renormalised on both sides the two are equal; the bucket of the tail keeps nearly all of what is there."""
    rng = np.random.default_rng(8)
    teacher, student = rng.standard_normal((2, 1, 500))
    teacher[:, :8] = student[:, :8] + 18
    student[:, :8] -= 4
    s, t = log_softmax(student), log_softmax(teacher)
    top = np.argsort(-t, -1)[:, :8]
    _, row, parameters = choose(name)

    def loss(s, t):
        return float(row.function(jnp.float32(s), jnp.float32(t), sum_V, **dict(parameters))[0])

    renormalised = loss(*(log_softmax(np.take_along_axis(x, top, -1)) for x in (s, t)))
    whole, coarse = loss(s, t), loss(_buckets(s, top), _buckets(t, top))
    assert 0.9 * whole < coarse <= whole * (1 + 1e-5)
    if name != "soft_cross_entropy":
        assert renormalised < 1e-6 * whole


def test_choose_takes_names_and_parameters():
    assert choose("jsd") == choose(" jsd ( beta = 0.5 ) ") == choose("jsd()")
    assert choose("alpha_beta(beta=0.3)").parameters == (("alpha", 0.2), ("beta", 0.3))
    chosen = choose("decoupled_kd(beta=2,alpha=3e-1)")
    assert (chosen.name, chosen.row) == ("decoupled_kd", DIVERGENCES["decoupled_kd"])
    assert hash(chosen.parameters) == hash((("alpha", 0.3), ("beta", 2.0)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jsdd", "'jsdd' is unknown; did you mean 'jsd'"),
        ("forward kl", "wanted NAME or NAME"),
        ("jsd(beta=0.5", "wanted NAME or NAME"),
        ("", "wanted NAME or NAME"),
        ("jsd(bet=0.5)", "no parameter 'bet'; did you mean 'beta'"),
        ("jsd(0.5)", "no parameter '0.5'; known: beta"),
        ("forward_kl(beta=0.5)", "takes none: write forward_kl"),
        ("jsd(beta=half)", "beta is 'half'; wanted a number"),
        ("jsd(beta=0.1, beta=0.2)", "given twice"),
        ("jsd(beta=0)", "above 0 and below 1.*forward_kl.*reverse_kl"),
        ("jsd(beta=1)", "above 0 and below 1.*forward_kl.*reverse_kl"),
        ("jsd(beta=nan)", "above 0 and below 1"),
        ("interpolated_jsd(beta=1)", "forward_kl in place of 0, reverse_kl in place of 1"),
        ("skewed_forward_kl(skew=0)", "forward_kl in place of 0"),
        ("skewed_reverse_kl(skew=1)", "reverse_kl in place of 0"),
        ("adaptive_kl(head=1)", "forward_kl"),
        ("alpha_beta(alpha=-0.1)", "alpha is -0.1; wanted a finite number from 0"),
        ("alpha_beta(beta=inf)", "beta is inf; wanted a finite number from 0"),
    ],
)
def test_choose_refuses_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        choose(text)
    assert "\n" not in str(error.value)
