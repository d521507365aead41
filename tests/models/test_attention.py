"""The mask of packed segments, and the kernel against a plain softmax in numpy."""

import jax
import numpy as np
import pytest

from kdjax.models.attention import attend, see
from kdjax.models.positions import rope_waves, rotate


def test_the_mask_is_causal_within_segments():
    mask = see(np.array([[1, 1, 2, 0]]), np.array([[1, 1, 2, 0]])).mask_B1TS[0, 0]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_queries_stand_at_their_slot():
    mask = see(np.array([[1, 1]]), np.array([[0, 1, 1, 1, 0]]), first_slot=2).mask_B1TS[0, 0]
    np.testing.assert_array_equal(mask, np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]], bool))


def test_attend_is_softmax_over_what_is_seen():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 5, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    segment = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
    got = attend(jax.numpy.asarray(q), jax.numpy.asarray(k), jax.numpy.asarray(v), see(segment, segment))
    for b, t, h in np.ndindex(2, 5, 4):
        seen = [s for s in range(t + 1) if segment[b, s] == segment[b, t]]
        scores = np.array([q[b, t, h] @ k[b, s, h // 2] / np.sqrt(8) for s in seen])
        weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        expected = sum(w * v[b, s, h // 2] for w, s in zip(weights, seen, strict=True))
        np.testing.assert_allclose(got[b, t, h], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("head_width", "tokens", "slots", "dtype", "taken"),
    [
        (64, 128, 128, "bfloat16", True),
        (64, 128, 128, "float32", False),
        (136, 128, 128, "bfloat16", False),
        (36, 128, 128, "bfloat16", False),
        (64, 127, 127, "bfloat16", False),
        (64, 1, 128, "bfloat16", False),
    ],
)
def test_cudnn_is_asked_for_only_on_a_gpu_and_where_it_can(monkeypatch, head_width, tokens, slots, dtype, taken):
    chosen = []

    def noted(q, k, v, mask, implementation):
        chosen.append(implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
    q = jax.numpy.zeros((1, tokens, 4, head_width), dtype)
    k = jax.numpy.zeros((1, slots, 2, head_width), dtype)
    sight = see(np.ones((1, tokens), int), np.ones((1, slots), int))
    attend(q, k, k, sight)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attend(q, k, k, sight)
    assert chosen == ["xla", "cudnn" if taken else "xla"]


def test_rotary_scores_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (np.broadcast_to(rng.normal(size=(1, 1, 1, 16)), (1, 20, 1, 16)).astype(np.float32) for _ in range(2))
    waves = rope_waves(np.arange(20)[None], 16, 10_000.0)
    scores = np.asarray(rotate(q, waves))[0, :, 0] @ np.asarray(rotate(k, waves))[0, :, 0].T
    for distance in range(-5, 6):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert abs(scores[0, 0] - scores[0, 7]) > 1e-2
