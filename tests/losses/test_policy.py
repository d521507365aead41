"""The reverse KL by the student's samples, against the exact gradient over all answers: V = 5, three tokens."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import (
    ObjectiveConfig,
    Term,
    fused_kd_loss,
    said_log_probs,
    sample_weights,
    target_log_probs,
    to_go,
)
from kdjax.shapes import Drawn, Head, Mixture, Signal, TopK
from kdjax.sharding import MeshConfig, placement

V, LENGTH = 5, 3
ANSWERS = np.array(list(itertools.product(range(V), repeat=LENGTH)))
CONTEXTS = [start for length in range(LENGTH) for start in itertools.product(range(V), repeat=length)]
STATES = np.array([[CONTEXTS.index(tuple(answer[:t])) for t in range(LENGTH)] for answer in ANSWERS])
"""What each token of each answer comes after, [answers, tokens]: a row of a table of logits."""
WHOLE = np.ones((len(ANSWERS), LENGTH), np.float32)
SEGMENT = np.ones((len(ANSWERS), LENGTH), np.int32)
TERMS = {
    "per token": (Term("sampled_reverse_kl"),),
    "with return-to-go": (Term("sampled_reverse_kl"), Term("likelihood_ratio", token_weight="return_to_go")),
    "single-step decomposition": (Term("reverse_kl"), Term("likelihood_ratio", token_weight="return_to_go")),
    "whole distribution": (Term("reverse_kl"),),
}
LONG = {"with return-to-go", "single-step decomposition"}


def table(seed):
    """The logits of a model after each beginning of an answer."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((len(CONTEXTS), V)), jnp.float32)


def log_probs(logits_SV):
    """Of the tokens of all answers."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_SV)[STATES], ANSWERS[:, :, None], 2)[:, :, 0]


def likely(logits_SV):
    """The probability of each answer."""
    return jnp.exp(log_probs(logits_SV).sum(1))


def exact(student_SV, teacher_SV, is_long):
    """The KL of whole answers; or Σ_t of each token's, what was said before being given."""
    gap = log_probs(student_SV) - log_probs(teacher_SV)
    if is_long:
        return (likely(student_SV) * gap.sum(1)).sum()
    p, q = (jax.nn.log_softmax(x)[STATES] for x in (teacher_SV, student_SV))
    each = (jnp.exp(q) * (q - p)).sum(-1)
    return (jax.lax.stop_gradient(likely(student_SV))[:, None] * each).sum()


def sampled(student_SV, teacher_SV, objective, temperature=1.0, **options):
    """The loss in the mean over all answers, each as often as the student gives it: hidden states are one-hot."""
    hidden_ND = jnp.eye(len(CONTEXTS))[STATES.reshape(-1)]
    head, signal = Head(student_SV, vocab_size=V), Signal(hidden_ND, Head(teacher_SV, vocab_size=V))
    weight_NT = jax.lax.stop_gradient(likely(student_SV / temperature))[:, None] * WHOLE
    targets_N, weight_N = jnp.asarray(ANSWERS.reshape(-1)), weight_NT.reshape(-1)
    given = targets_N, objective, temperature
    both = target_log_probs(hidden_ND, head, *given, **options), said_log_probs(signal, *given, **options)
    given = (*(x_N.reshape(WHOLE.shape) for x_N in both), WHOLE, SEGMENT, None, 0.2)
    weights = {name: x.reshape(-1) for name, x in sample_weights(*given).items()}
    given = (hidden_ND, head, signal, targets_N, weight_N, weight_N, objective)
    return fused_kd_loss(*given, token_weights=weights, **options)[0]


@pytest.mark.parametrize("mesh", [None, {"data": 5}, {"data": 1, "tensor": 5}], ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_is_the_exact_one_over_all_answers(name, mesh):
    """In the mean over what the student says, each way; also where tokens or the vocabulary lie on five devices."""
    options = {"shard": placement(MeshConfig(**mesh), jax.devices()[:5]).shard_loss} if mesh else {}
    student, teacher = table(0), table(1)
    objective = ObjectiveConfig(alpha=0.0, terms=TERMS[name], chunk_tokens=25)
    got = jax.jit(jax.grad(lambda s: sampled(s, teacher, objective, **options)))(student)
    wanted = jax.grad(lambda s: exact(s, teacher, name in LONG))(student)
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    other = jax.grad(lambda s: exact(s, teacher, name not in LONG))(student)
    assert np.abs(wanted - other).max() > 0.02, "the two gradients differ, so that one is no other"


def test_the_value_is_the_divergence_in_the_mean():
    student, teacher = table(0), table(1)
    objective = ObjectiveConfig(alpha=0.0, terms=TERMS["per token"])
    wanted = exact(student, teacher, True)
    assert float(sampled(student, teacher, objective)) == pytest.approx(float(wanted), rel=1e-5)


def test_a_temperature_is_that_of_both_models():
    """The gradient of T²·KL of the softened models, over answers drawn from the softened student."""
    student, teacher, t = table(2), table(3), 2.0
    terms = tuple(replace(term, temperature=t) for term in TERMS["single-step decomposition"])
    got = jax.grad(lambda s: sampled(s, teacher, ObjectiveConfig(alpha=0.0, terms=terms), t))(student)
    wanted = jax.grad(lambda s: t * t * exact(s / t, teacher / t, True))(student)
    np.testing.assert_allclose(got, wanted, atol=5e-6)


def test_what_is_to_go_is_of_the_same_answer_and_counts_what_weighs():
    x_BR = np.array([[1.0, 2, 3, 4, 5, 0, 7], [1, 1, 1, 1, 1, 1, 1]], np.float32)
    segment_BR = np.array([[1, 1, 1, 2, 2, 1, 1], [1, 2, 3, 3, 3, 3, 4]])
    weight_BR = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    found = to_go(x_BR, weight_BR, segment_BR)
    np.testing.assert_allclose(found["return_to_go"][0][:5], [5, 3, 0, 5, 0])
    np.testing.assert_allclose(found["return_to_go"][1], [0, 0, 3, 2, 1, 0, 0])
    np.testing.assert_allclose(found["mean_to_go"][0][:5], [2.5, 3, 0, 5, 0])
    np.testing.assert_allclose(found["mean_to_go"][1], [0, 0, 1, 1, 1, 0, 0])


def test_log_probabilities_are_those_of_float64_also_of_a_mixture():
    rng = np.random.default_rng(4)
    hidden, others = rng.standard_normal((70, 8)), rng.standard_normal((2, 70, 6))
    w, (first, second), targets = rng.standard_normal((8, 11)), rng.standard_normal((2, 6, 11)), rng.integers(0, 9, 70)
    head = lambda w: Head(jnp.asarray(w, jnp.float32), vocab_size=9)  # noqa: E731 (two columns are padding)
    signals = tuple(Signal(jnp.asarray(h, jnp.float32), head(w)) for h, w in zip(others, (first, second), strict=True))
    mixture = Mixture(signals, jnp.array([0.25, 0.75]))

    def logs(h, w):
        x = (h @ w)[:, :9] / 1.5
        return (x - np.logaddexp.reduce(x, axis=1, keepdims=True))[np.arange(70), targets]

    objective = ObjectiveConfig(chunk_tokens=16)
    given = jnp.asarray(hidden, jnp.float32), head(w)
    said = jnp.asarray(targets), objective, 1.5
    log_q, log_p = target_log_probs(*given, *said), said_log_probs(mixture, *said)
    p = 0.25 * np.exp(logs(others[0], first)) + 0.75 * np.exp(logs(others[1], second))
    np.testing.assert_allclose(log_q, logs(hidden, w), atol=1e-5)
    np.testing.assert_allclose(log_p, np.log(p), atol=1e-5)
    sparse = TopK(jnp.zeros((70, 1), jnp.int32), jnp.zeros((70, 1)), jnp.zeros(70))
    with pytest.raises(UserError, match="return_to_go, mean_to_go and importance need all of the teacher's logits"):
        said_log_probs(sparse, jnp.asarray(targets), objective)


def test_terms_that_make_no_sense_are_refused():
    for wrong in ({"divergence": "likelihood_ratio"}, {"token_weight": "return_to_go"}):
        with pytest.raises(UserError, match="wanted likelihood_ratio with return_to_go or mean_to_go, or neither"):
            Term(**wrong)


def ppo(log_now, log_then, cost, clip):
    """The slope of PPO's pessimistic cost by log q at a token, in float64."""
    ratio = np.exp(log_now - log_then)
    bounds = max(ratio * cost, float(np.clip(ratio, 1 - clip, 1 + clip)) * cost)
    return ratio * cost if bounds == ratio * cost else 0.0


def test_a_ratio_beyond_the_clip_is_left_out_as_in_ppo():
    rng = np.random.default_rng(5)
    now, then, source, teacher = -rng.uniform(0.1, 3, (4, 3, 6))
    then[0] = now[0] + rng.uniform(-0.1, 0.1, 6)
    weight, segment = np.ones((3, 6), np.float32), np.ones((3, 6), np.int32)
    given = [jnp.asarray(x, jnp.float32) for x in (now, teacher)]
    found = sample_weights(*given, weight, segment, Drawn(jnp.asarray(then), jnp.asarray(source)), 0.2)
    cost = to_go(now - teacher, weight, segment)["return_to_go"]
    other = np.exp(then - source)
    for name, costs in {"return_to_go": cost, "sampled_reverse_kl": now - teacher}.items():
        wanted = np.vectorize(ppo)(now, then, costs, 0.2) * other
        scale = 1 if name == "return_to_go" else costs
        np.testing.assert_allclose(found[name] * scale, wanted, rtol=1e-4, atol=1e-6)
        assert 0 < (wanted == 0).sum() < wanted.size
    np.testing.assert_allclose(found["importance"], np.clip(np.exp(now - then), 0.8, 1.2) * other, rtol=1e-5)


MIXED = {
    "sampled": (Term("sampled_reverse_kl"),),
    "minillm": (
        Term("reverse_kl", token_weight="importance"),
        Term("likelihood_ratio", token_weight="return_to_go"),
    ),
}


def of_drawn(student_SV, teacher_SV, drawn_SV, terms, answers):
    """The loss in the mean over answers that `drawn_SV` gives, of which `answers` tokens count."""
    counts = WHOLE * (np.arange(LENGTH) < answers)
    hidden_ND = jnp.eye(len(CONTEXTS))[STATES.reshape(-1)]
    head, signal = Head(student_SV, vocab_size=V), Signal(hidden_ND, Head(teacher_SV, vocab_size=V))
    weight_N = (likely(drawn_SV)[:, None] * counts).reshape(-1)
    targets_N, objective = jnp.asarray(ANSWERS.reshape(-1)), ObjectiveConfig(alpha=0.0, terms=terms)
    both = target_log_probs(hidden_ND, head, targets_N, objective), said_log_probs(signal, targets_N, objective)
    now, theirs = (x_N.reshape(WHOLE.shape) for x_N in both)
    drawn = Drawn(now, log_probs(drawn_SV))
    weights = {name: x.reshape(-1) for name, x in sample_weights(now, theirs, counts, SEGMENT, drawn, 0.2).items()}
    given = (hidden_ND, head, signal, targets_N, weight_N, weight_N, objective)
    return fused_kd_loss(*given, token_weights=weights)[0]


@pytest.mark.parametrize("name", MIXED)
def test_answers_drawn_together_with_the_teacher_weigh_as_if_the_student_had(name):
    """Answers of one token: the very gradient of the student's own. Longer ones: MiniLLM's, each token by its ratio."""
    student, teacher = table(0), table(1)
    mixed = jnp.log(0.7 * jax.nn.softmax(student) + 0.3 * jax.nn.softmax(teacher))
    got = jax.grad(of_drawn)(student, teacher, mixed, MIXED[name], 1)
    first = jax.nn.log_softmax(teacher[0])
    alone = jax.grad(lambda s: (jax.nn.softmax(s[0]) * (jax.nn.log_softmax(s[0]) - first)).sum())(student)
    np.testing.assert_allclose(got, alone, atol=2e-6)
    bare = jax.grad(of_drawn)(student, teacher, student, MIXED[name], 1)
    np.testing.assert_allclose(bare, alone, atol=2e-6)

    def minillm(s):
        p, q, w = likely(mixed), log_probs(s), jnp.exp(log_probs(student) - log_probs(mixed))
        gap = log_probs(student) - log_probs(teacher)
        after = jnp.cumsum(gap[:, ::-1], 1)[:, ::-1] - gap
        t, s_ = (jax.nn.log_softmax(x)[STATES] for x in (teacher, s))
        own = (jnp.exp(s_) * (s_ - t)).sum(-1) if name == "minillm" else gap * q
        return (p[:, None] * w * (own + (after * q if name == "minillm" else 0))).sum()

    got = jax.grad(of_drawn)(student, teacher, mixed, MIXED[name], LENGTH)
    np.testing.assert_allclose(got, jax.grad(minillm)(student), atol=2e-6)
