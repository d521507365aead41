"""Teachers that are several, or that say only a part: against float64, and what cannot be had of them is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import ObjectiveConfig, Term, fused_kd_loss, sample, top_k
from kdjax.shapes import Head, Mixture, Sampled, Signal, TopK
from kdjax.sharding import MeshConfig, placement

N, V = 24, 40


def _logs(x, temperature=1.0):
    x = np.asarray(x, np.float64) / temperature
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _logits(seed, scale=2.0, n=N):
    return (scale * np.random.default_rng(seed).standard_normal((n, V))).astype(np.float32)


EYE = Head(jnp.eye(V), vocab_size=V)
"""With it hidden states are logits."""


def _loss(student, signal, objective, weight=None, **options):
    n = student.shape[0]
    weight = jnp.full(n, 1 / n) if weight is None else jnp.asarray(weight, jnp.float32)
    options.setdefault("head", EYE)
    head = options.pop("head")
    return fused_kd_loss(jnp.asarray(student), head, signal, jnp.arange(n) % V, weight, weight, objective, **options)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_several_teachers_are_the_mixture_of_their_distributions(temperature, by_token):
    student, first, second = _logits(0), _logits(1), _logits(2)
    share = np.random.default_rng(3).random(N) if by_token else np.full(N, 0.3)
    weights = np.stack([share, 1 - share], 1)
    mixture = Mixture((Signal(first, EYE), Signal(second, EYE)), jnp.asarray(weights if by_token else weights[0]))
    objective = ObjectiveConfig(0.0, temperature, chunk_tokens=5)
    (value, parts), gradient = jax.value_and_grad(lambda s: _loss(s, mixture, objective), has_aux=True)(student)
    p = weights[:, :1] * np.exp(_logs(first, temperature)) + weights[:, 1:] * np.exp(_logs(second, temperature))
    q = _logs(student, temperature)
    np.testing.assert_allclose(value, temperature**2 * (p * (np.log(p) - q)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, temperature * (np.exp(q) - p) / N, atol=1e-7)
    one = weights[:, :1] * np.exp(_logs(first)) + weights[:, 1:] * np.exp(_logs(second))
    np.testing.assert_allclose(parts["teacher_entropy"], -(one * np.log(one)).sum(-1).mean(), rtol=1e-5)


def _buckets(logs, ids):
    picked = np.take_along_axis(logs, ids, 1)
    rest = np.exp(logs)
    np.put_along_axis(rest, ids, 0, 1)
    return np.concatenate([picked, np.log(rest.sum(1, keepdims=True))], 1)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd(beta=0.3)"])
@pytest.mark.parametrize("mesh", [None, {"data": 4, "tensor": 2}, {"data": 1, "tensor": 8}], ids=str)
def test_top_k_is_the_divergence_between_buckets(divergence, mesh):
    student, teacher, temperature = _logits(0), _logits(1), 2.0
    signal = top_k(jax.nn.log_softmax(teacher / temperature), 5, temperature)
    options = {"shard": placement(MeshConfig(**mesh)).shard_loss} if mesh else {}
    objective = ObjectiveConfig(0.2, temperature, divergence, chunk_tokens=5)
    run = jax.jit(jax.value_and_grad(lambda s: _loss(s, signal, objective, **options), has_aux=True))
    (value, parts), gradient = run(student)

    ids = np.asarray(signal.ids_NP)
    assert np.all(np.sort(ids) == np.sort(np.argsort(-teacher, 1)[:, :5]))

    def exact(student):
        s, t = _buckets(_logs(student, temperature), ids), _buckets(_logs(teacher, temperature), ids)
        kl = lambda p, q: (np.exp(p) * (p - q)).sum(-1)  # noqa: E731
        m = np.log(0.3 * np.exp(t) + 0.7 * np.exp(s))
        loss = {"forward_kl": kl(t, s), "reverse_kl": kl(s, t)}.get(divergence, 0.3 * kl(t, m) + 0.7 * kl(s, m))
        ce = -_logs(student)[np.arange(N), np.arange(N) % V].mean()
        return 0.2 * ce + 0.8 * temperature**2 * loss.mean()

    np.testing.assert_allclose(value, exact(student), rtol=1e-5)
    for row, column in ((0, int(ids[0, 0])), (3, 7), (N - 1, V - 1)):
        step = np.zeros((N, V))
        step[row, column] = 1e-5
        slope = (exact(student + step) - exact(student - step)) / 2e-5
        np.testing.assert_allclose(gradient[row, column], slope, rtol=1e-3, atol=1e-7)
    agreement = (student.argmax(1) == teacher.argmax(1)).mean()
    np.testing.assert_allclose(parts["agreement"], agreement, atol=1e-6)
    assert "teacher_entropy" not in parts


def test_trap_5_a_student_that_has_almost_nothing_of_the_top_k():
    """Renormalising both sides would say 0; the tail's bucket keeps all but a little of the true KL."""
    teacher = np.full((1, V), -12.0, np.float32)
    teacher[0, :4] = [2.0, 1.5, 1.0, 0.5]
    student = np.where(np.arange(V) < 4, teacher - 20, 0).astype(np.float32)
    signal = top_k(jax.nn.log_softmax(teacher), 4)
    true = float((np.exp(_logs(teacher)) * (_logs(teacher) - _logs(student))).sum())
    got = float(_loss(student, signal, ObjectiveConfig(0.0))[0])
    assert true > 15 and true - 0.1 < got <= true * (1 + 1e-6)


def test_a_tail_rounded_to_nothing_stays_finite():
    teacher = np.where(np.arange(V) < 3, 60.0, -60.0)[None].astype(np.float32)
    signal = top_k(jax.nn.log_softmax(teacher), 3)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        run = jax.value_and_grad(lambda s, d=divergence: _loss(s, signal, ObjectiveConfig(0.0, divergence=d))[0])
        value, gradient = run(-teacher)
        assert np.isfinite(value) and np.all(np.isfinite(gradient)) and value > 0.5


@pytest.mark.parametrize("mesh", [None, {"data": 4, "tensor": 2}], ids=str)
def test_trap_23_sampled_logits_are_unbiased_in_value_and_gradient(mesh):
    """The mean over many draws is within 4 standard errors of the exact loss and of its gradient."""
    student, teacher, times = _logits(0, n=8), _logits(1, scale=0.5, n=8), 400  # no entry too rare to be drawn
    options = {"shard": placement(MeshConfig(**mesh)).shard_loss} if mesh else {}
    weight = np.full(8, 1.0)

    @jax.jit
    def once(key):
        signal = sample(jax.random.split(key, 8), jax.nn.log_softmax(teacher), 6)
        return jax.value_and_grad(lambda s: _loss(s, signal, ObjectiveConfig(0.0), weight, **options)[0])(student)

    values, gradients = jax.lax.map(once, jax.random.split(jax.random.key(0), times))
    p, q = _logs(teacher), _logs(student)
    gap = np.exp(p) * (p - q) ** 2
    of_value = np.sqrt((gap.sum(-1) - (np.exp(p) * (p - q)).sum(-1) ** 2).sum())
    of_gradient = np.sqrt(np.exp(p) * (1 - np.exp(p)))
    exact = (np.exp(p) * (p - q)).sum(), np.exp(q) - np.exp(p)
    for got, want, deviation in zip((values, gradients), exact, (of_value, of_gradient), strict=True):
        error = np.asarray(got, np.float64).mean(0) - want
        assert np.all(np.abs(error) < 4 * deviation / np.sqrt(6 * times))


def test_trap_22_the_gradient_of_reverse_kl_is_that_of_its_score_function():
    """E_q[(log q − log p)·∇ log q], all of q summed out, is the gradient; differentiating draws of q is refused.

    Differentiating log q(x) − log p(x) at draws x of q gives 0 in the mean, whatever the models are.
    """
    student, teacher = _logits(0), _logits(1)
    p, q = _logs(teacher), _logs(student)
    scores_NVV = np.eye(V)[None] - np.exp(q)[:, None, :]  # of each outcome, with respect to the logits
    surrogate = np.einsum("nv,nvw->nw", np.exp(q) * (q - p), scores_NVV)
    objective = ObjectiveConfig(0.0, divergence="reverse_kl", chunk_tokens=5)
    gradient = jax.grad(lambda s: _loss(s, Signal(teacher, EYE), objective)[0])(student)
    np.testing.assert_allclose(gradient * N, surrogate, atol=2e-6)
    direct = np.einsum("nv,nvw->nw", np.exp(q), scores_NVV)
    assert np.abs(direct).max() < 1e-12 < 1e-2 < np.abs(surrogate).max()
    with pytest.raises(UserError, match="reverse_kl of sampled logits would be biased"):
        _loss(student, sample(jax.random.split(jax.random.key(0), N), q.astype(np.float32), 5), objective)


def test_a_top_k_alone_is_biased_where_draws_are_not():
    """Trap 23: the gradient of the buckets is not the whole one, however often it is drawn."""
    student, teacher = _logits(0), _logits(1, scale=0.5)
    signal = top_k(jax.nn.log_softmax(teacher), 5)
    gradient = jax.grad(lambda s: _loss(s, signal, ObjectiveConfig(0.0))[0])(student)
    assert np.abs(gradient * N - (np.exp(_logs(student)) - np.exp(_logs(teacher)))).max() > 0.02


SPARSE = {
    "top_k": top_k(jax.nn.log_softmax(_logits(1)), 5),
    "sampled": sample(jax.random.split(jax.random.key(0), N), jax.nn.log_softmax(_logits(1)), 5),
}


@pytest.mark.parametrize(
    ("kind", "objective", "message"),
    [
        ("sampled", {"divergence": "reverse_kl"}, "reverse_kl of sampled logits would be biased"),
        ("sampled", {"divergence": "jsd"}, "jsd of sampled logits would be biased"),
        ("sampled", {"terms": (Term(clip_entry=1.0),)}, "unclipped"),
        ("sampled", {"temperature": 2.0}, "temperature is 2.0 but the teacher's sparse signal was taken at 1.0"),
        ("top_k", {"temperature": "linear(1, 2)"}, "taken at 1.0, which cannot be re-tempered"),
        ("top_k", {"divergence": "mse"}, "mse needs all of the teacher's logits"),
        ("top_k", {"divergence": "decoupled_kd"}, "decoupled_kd needs all"),
        ("top_k", {"standardise": True}, "on standardised logits needs all"),
        ("top_k", {"terms": (Term(token_weight="teacher_entropy"),)}, "token weight teacher_entropy needs all"),
    ],
)
def test_trap_18_what_a_sparse_signal_cannot_give_is_refused(kind, objective, message):
    with pytest.raises(UserError, match=message):
        _loss(_logits(0), SPARSE[kind], ObjectiveConfig(0.0, **objective))


def test_the_soft_cross_entropy_of_draws_is_their_own_mean():
    value = _loss(_logits(0), SPARSE["sampled"], ObjectiveConfig(0.0, divergence="soft_cross_entropy"))[0]
    picked = np.take_along_axis(_logs(_logits(0)), np.asarray(SPARSE["sampled"].ids_NP), 1)
    np.testing.assert_allclose(value, -picked.mean(), rtol=1e-5)


def test_bad_counts_are_refused():
    with pytest.raises(UserError, match="k is 41; wanted at least 1 and at most the vocabulary, 40"):
        top_k(jnp.zeros((2, V)), 41)
    with pytest.raises(UserError, match="draws is 0; wanted at least 1"):
        sample(jax.random.split(jax.random.key(0), 2), jnp.zeros((2, V)), 0)


def test_teachers_of_other_shapes_are_named():
    with pytest.raises(UserError, match="N is 24 in student_hidden_NX but 8 in ids_NP"):
        _loss(_logits(0), TopK(jnp.zeros((8, 2), int), jnp.zeros((8, 2)), jnp.zeros(8)), ObjectiveConfig(0.0))
    assert isinstance(SPARSE["sampled"], Sampled)
