"""The mask of packed segments, and the kernel against a plain softmax in numpy."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from kdjax.models.attention import attend, see


def test_the_mask_is_causal_within_segments():
    mask = see(np.array([[1, 1, 2, 0]]), np.array([[1, 1, 2, 0]])).mask_B1TS[0, 0]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_an_encoder_sees_both_sides_and_a_decoder_its_own_segment_of_the_encoder():
    mask = see(np.array([[1, 1, 2, 0]]), np.array([[1, 1, 2, 0]]), causal=False).mask_B1TS[0, 0]
    np.testing.assert_array_equal(mask, np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool))
    cross = see(np.array([[1, 2]]), np.array([[2, 1, 1]]), causal=False).mask_B1TS[0, 0]
    np.testing.assert_array_equal(cross, np.array([[0, 1, 1], [1, 0, 0]], bool))
    within = see(np.ones((1, 4), int), np.ones((1, 4), int), causal=False).within(2).mask_B1TS[0, 0]
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    np.testing.assert_array_equal(within, np.array(expected, bool))


def test_queries_stand_at_their_slot():
    mask = see(np.array([[1, 1]]), np.array([[0, 1, 1, 1, 0]]), first_slot=2).mask_B1TS[0, 0]
    np.testing.assert_array_equal(mask, np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]], bool))


def test_a_window_is_what_lies_fewer_tokens_back():
    sight = see(np.array([[1, 1, 1, 1]]), np.array([[1, 1, 1, 1]]))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(sight.within(2).mask_B1TS[0, 0], np.array(expected, bool))
    cached = see(np.array([[1]]), np.array([[1, 1, 1, 1, 0]]), first_slot=3).within(3)
    np.testing.assert_array_equal(cached.mask_B1TS[0, 0], np.array([[0, 1, 1, 1, 0]], bool))


def test_a_prefix_is_seen_by_real_tokens_of_every_segment_and_counts_from_each():
    segment, position = np.array([[1, 1, 2, 0]]), np.array([[3, 4, 3, 3]])
    sight = see(segment, segment).behind(jax.numpy.asarray(position), 3)
    own = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    seen = np.array([[1] * 3] * 3 + [[0] * 3], bool)
    np.testing.assert_array_equal(sight.mask_B1TS[0, 0], np.concatenate([seen, own], 1))
    np.testing.assert_array_equal(sight.key_segment_BS, [[-1, -1, -1, 1, 1, 2, 0]])
    near = np.array([[0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]], bool)
    np.testing.assert_array_equal(sight.within(2).mask_B1TS[0, 0], np.concatenate([near, own], 1))


@pytest.mark.parametrize(
    ("window", "scale", "soft_cap", "biased"),
    [
        (9, None, None, False),
        (2, None, None, False),
        (9, 0.7, None, False),
        (9, None, 0.5, False),
        (3, 0.7, 0.5, False),
        (3, 0.7, None, True),
    ],
)
def test_attend_is_softmax_over_what_is_seen(window, scale, soft_cap, biased):
    rng = np.random.default_rng(0)
    bias = rng.normal(size=(1, 4, 5, 5)).astype(np.float32) * biased
    q, k, v = (rng.normal(size=(2, 5, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    segment = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
    sight = replace(see(segment, segment).within(window), scale=scale, soft_cap=soft_cap)
    sight = replace(sight, bias_BHTS=jax.numpy.asarray(bias) if biased else None)
    got = attend(jax.numpy.asarray(q), jax.numpy.asarray(k), jax.numpy.asarray(v), sight)
    for b, t, h in np.ndindex(2, 5, 4):
        seen = [s for s in range(max(0, t - window + 1), t + 1) if segment[b, s] == segment[b, t]]
        scores = np.array([q[b, t, h] @ k[b, s, h // 2] * (scale or 8**-0.5) for s in seen], np.float64)
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        scores += bias[0, h, t, seen]
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
        (64, 128, 192, "bfloat16", False),  # behind a prefix
    ],
)
def test_cudnn_is_asked_for_only_on_a_gpu_and_where_it_can(monkeypatch, head_width, tokens, slots, dtype, taken):
    chosen = []

    def noted(q, k, v, bias, mask, scale, implementation):
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
