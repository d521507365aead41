"""The sum of terms: schedules, weights by token, caps, smoothing; against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import ObjectiveConfig, Term, fused_kd_loss
from kdjax.losses.schedules import value_at
from kdjax.shapes import Head, Signal

N, V = 20, 30
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (2 * RNG.standard_normal((2, N, V))).astype(np.float32)
CE, KD = (RNG.random((2, N)) / N).astype(np.float32)
TARGETS = RNG.integers(0, V, N).astype(np.int32)
EYE = Head(jnp.eye(V), vocab_size=V)


def _run(objective, student=STUDENT, **options):
    return fused_kd_loss(jnp.asarray(student), EYE, Signal(TEACHER, EYE), TARGETS, CE, KD, objective, **options)


def _logs(x, temperature=1.0):
    x = np.asarray(x, np.float64) / temperature
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _forward(temperature=1.0):
    p, q = _logs(TEACHER, temperature), _logs(STUDENT, temperature)
    return (np.exp(p) * (p - q)).sum(-1)


def _reverse(temperature=1.0):
    p, q = _logs(TEACHER, temperature), _logs(STUDENT, temperature)
    return (np.exp(q) * (q - p)).sum(-1)


def _ce(logits=STUDENT):
    return -_logs(logits)[np.arange(N), TARGETS]


def test_terms_add_up_each_with_its_weight_temperature_and_factor():
    objective = ObjectiveConfig(
        0.25, terms=(Term("forward_kl", 2.0, 0.7), Term("reverse_kl", 4.0, 0.2, scaled=False)), chunk_tokens=6
    )
    value, parts = _run(objective)
    first, second = 0.7 * 4 * (KD * _forward(2)).sum(), 0.2 * (KD * _reverse(4)).sum()
    np.testing.assert_allclose(value, 0.25 * (CE * _ce()).sum() + 0.75 * (first + second), rtol=1e-5)
    np.testing.assert_allclose([parts["kd_0_forward_kl"], parts["kd_1_reverse_kl"]], [first, second], rtol=1e-5)
    np.testing.assert_allclose(parts["kd"], first + second, rtol=1e-5)


def test_two_terms_are_one_pass_over_the_logits():
    count = lambda objective: str(jax.make_jaxpr(lambda s: _run(objective, s))(STUDENT)).count("dot_general")  # noqa: E731
    assert count(ObjectiveConfig(terms=(Term(), Term("reverse_kl", 2.0), Term("jsd")))) == count(ObjectiveConfig())


def test_tokens_are_weighted_by_an_array_as_distillm_2_wants():
    """Its pair: one divergence on the teacher's texts, another on the student's (arXiv:2503.07067)."""
    by_teacher = (np.arange(N) % 2).astype(np.float32)
    objective = ObjectiveConfig(
        0.0,
        terms=(Term("forward_kl", token_weight="teacher_text"), Term("reverse_kl", token_weight="student_text")),
        chunk_tokens=6,
    )
    value, _ = _run(objective, token_weights={"teacher_text": by_teacher, "student_text": 1 - by_teacher})
    exact = (KD * np.where(by_teacher == 1, _forward(), _reverse())).sum()
    np.testing.assert_allclose(value, exact, rtol=1e-5)


@pytest.mark.parametrize("name", ["teacher_entropy", "teacher_confidence", "student_entropy", "difficulty"])
def test_tokens_are_weighted_by_what_the_logits_say(name):
    p, q = _logs(TEACHER), _logs(STUDENT)
    weight = {
        "teacher_entropy": -(np.exp(p) * p).sum(-1) / np.log(V),
        "teacher_confidence": np.exp(p.max(-1)),
        "student_entropy": -(np.exp(q) * q).sum(-1) / np.log(V),
        "difficulty": 1 - np.exp(-_ce()),
    }[name]
    objective = ObjectiveConfig(0.0, terms=(Term(token_weight=name),), chunk_tokens=6)
    value, gradient = jax.value_and_grad(lambda s: _run(objective, s)[0])(STUDENT)
    np.testing.assert_allclose(value, (KD * weight * _forward()).sum(), rtol=1e-5)
    exact = (KD * weight)[:, None] * (np.exp(q) - np.exp(p))  # the weight is a constant
    np.testing.assert_allclose(gradient, exact, atol=1e-7)


def test_a_cap_on_tokens_takes_the_gradient_of_those_above_it():
    cap = float(np.median(_forward()))
    objective = ObjectiveConfig(0.0, terms=(Term(clip_token=cap),), chunk_tokens=6)
    value, gradient = jax.value_and_grad(lambda s: _run(objective, s)[0])(STUDENT)
    np.testing.assert_allclose(value, (KD * np.minimum(_forward(), cap)).sum(), rtol=1e-5)
    assert np.all((np.abs(gradient).max(1) == 0) == (_forward() > cap))


def test_a_cap_on_entries_can_make_the_loss_negative():
    objective = ObjectiveConfig(0.0, terms=(Term(clip_entry=0.01),), chunk_tokens=6)
    p, q = _logs(TEACHER), _logs(STUDENT)
    exact = (KD * np.minimum(np.exp(p) * (p - q), 0.01).sum(-1)).sum()
    np.testing.assert_allclose(_run(objective)[0], exact, rtol=1e-4)
    assert exact < 0


def test_label_smoothing_and_z_loss_against_float64():
    q, smooth = _logs(STUDENT), 0.1
    z = np.log(np.exp(STUDENT.astype(np.float64)).sum(-1))
    objective = ObjectiveConfig(0.5, label_smoothing=smooth, z_loss=0.01, chunk_tokens=6)
    value, parts = _run(objective)
    ce, even = (CE * _ce()).sum(), (CE * -q.mean(-1)).sum()
    hard = (1 - smooth) * ce + smooth * even + 0.01 * (CE * z * z).sum()
    np.testing.assert_allclose(value, 0.5 * hard + 0.5 * (KD * _forward()).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        [parts["ce"], parts["ce_even"], parts["z_loss"]], [ce, even, (CE * z * z).sum()], rtol=1e-5
    )


def test_standardised_logits_are_of_mean_0_and_deviation_1():
    """A student whose logits are an affine map of the teacher's has nothing left to learn."""
    objective = ObjectiveConfig(0.0, 2.0, standardise=True)
    assert _run(objective, 3.0 * TEACHER + 5.0)[0] < 1e-6 < 0.01 < _run(objective)[0]
    z = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)  # noqa: E731
    p, q = _logs(z(TEACHER.astype(np.float64)), 2), _logs(z(STUDENT.astype(np.float64)), 2)
    np.testing.assert_allclose(_run(objective)[0], 4 * (KD * (np.exp(p) * (p - q)).sum(-1)).sum(), rtol=1e-5)


def test_schedules_go_from_start_to_end_by_the_share_of_the_run():
    assert value_at(0.3, 0.7) == 0.3 and value_at("0.3", 0.7) == 0.3
    for progress, linear, cosine in (
        (0.0, 4.0, 4.0),
        (0.25, 3.25, 4 - 3 * (1 - np.cos(np.pi / 4)) / 2),
        (1.0, 1.0, 1.0),
    ):
        np.testing.assert_allclose(value_at("linear(4, 1)", progress), linear)
        np.testing.assert_allclose(value_at("cosine(4,1)", progress), cosine, rtol=1e-6)


def test_scheduled_values_are_those_of_the_constant_at_that_point():
    moving = ObjectiveConfig("linear(0.2, 0.6)", "linear(4, 2)", "reverse_kl", chunk_tokens=6)
    still = ObjectiveConfig(0.3, 3.5, "reverse_kl", chunk_tokens=6)
    run = jax.jit(lambda s, progress: jax.value_and_grad(lambda s: _run(moving, s, progress=progress)[0])(s))
    got, want = run(STUDENT, 0.25), jax.value_and_grad(lambda s: _run(still, s)[0])(STUDENT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_numbers_that_are_not_finite_are_counted_by_name():
    student = STUDENT.copy()
    student[3, :2] = np.nan
    _, parts = _run(ObjectiveConfig(debug=True), student)
    assert parts["not_finite_student_hidden"] == 2 and parts["not_finite_teacher_0_hidden"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5; wanted a weight from 0 to 1"),
        ({"alpha": "linear(0, 2)"}, r"alpha is linear\(0, 2\); wanted a weight"),
        ({"alpha": float("nan")}, "alpha is nan; wanted a finite number"),
        ({"temperature": 0.0}, "temperature is 0.0; wanted a number above 0"),
        ({"temperature": "cosine(4, 0)"}, r"temperature is cosine\(4, 0\); wanted a number above 0"),
        ({"temperature": "liner(4, 1)"}, "no schedule 'liner'; did you mean 'linear'"),
        ({"temperature": "hot"}, "temperature is 'hot'; wanted a number, or a schedule"),
        ({"divergence": "forward_lk"}, "did you mean 'forward_kl'"),
        ({"divergence": "jsd(beta=0)"}, "forward_kl"),
        ({"divergence": "jsd(gamma=0.5)"}, "beta"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; wanted at least 1, or auto"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"temperature": 2.0, "terms": (Term(),)}, "set these in the terms"),
    ],
)
def test_a_bad_objective_is_one_clear_line(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        ObjectiveConfig(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": -1.0}, "weight is -1.0"),
        ({"clip_token": -1.0}, "clip_token is -1.0"),
        ({"divergence": "adaptive_kl", "clip_entry": 1.0}, "adaptive_kl is no plain sum"),
    ],
)
def test_a_bad_term_is_one_clear_line(wrong, message):
    with pytest.raises(UserError, match=message):
        Term(**wrong)


def test_an_unknown_token_weight_gets_the_nearest_name():
    with pytest.raises(UserError, match="no token weight 'teacher_entrpy'; did you mean 'teacher_entropy'"):
        _run(ObjectiveConfig(terms=(Term(token_weight="teacher_entrpy"),)))
