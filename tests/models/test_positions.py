"""Rotary angles against float64 numpy, written from the papers wave by wave."""

import math

import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models import ModelConfig
from kdjax.models.config import Rope
from kdjax.models.positions import SCALINGS, alibi, relative_buckets, rope_waves, rotate, sinusoids

K, T = 16, 24
ROPES = {
    "none": Rope(100.0),
    "linear": Rope(100.0, "linear", 4.0),
    "dynamic": Rope(100.0, "dynamic", 4.0, 10),
    "yarn": Rope(100.0, "yarn", 4.0, 60, beta_slow=1.0, beta_fast=3.0, attention_factor=1.1),
    "yarn, bounds kept": Rope(100.0, "yarn", 4.0, 60, beta_slow=1.0, beta_fast=3.0, truncate=False),
    "llama3": Rope(100.0, "llama3", 4.0, 60, low_frequency=1.0, high_frequency=3.0),
}


def frequency64(rope, wave, length):
    """The angle of one position more, of one wave."""
    theta = rope.theta
    if rope.scaling == "dynamic" and length > rope.made_for:
        theta *= (rope.factor * length / rope.made_for - (rope.factor - 1)) ** (K / (K - 2))
    plain = theta ** (-2 * wave / K)
    wavelength = 2 * math.pi / plain
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        if wavelength < rope.made_for / rope.high_frequency:
            return plain
        if wavelength > rope.made_for / rope.low_frequency:
            return plain / rope.factor
        smooth = (rope.made_for / wavelength - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
        return (1 - smooth) * plain / rope.factor + smooth * plain
    if rope.scaling == "yarn":
        low, high = (
            K * math.log(rope.made_for / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        low, high = (math.floor(low), math.ceil(high)) if rope.truncate else (low, high)
        ramp = min(max((wave - max(low, 0)) / (min(high, K - 1) - max(low, 0)), 0), 1)
        return plain * (1 - ramp) + plain / rope.factor * ramp
    return plain


def test_every_scaling_has_its_reference():
    assert {rope.scaling for rope in ROPES.values()} == set(SCALINGS)


@pytest.mark.parametrize("name", ROPES)
def test_angles_against_float64(name):
    rope = ROPES[name]
    found = rope_waves(np.arange(T)[None], np.ones((1, T), int), K, rope)
    angle = np.array([[t * frequency64(rope, wave, T) for wave in range(K // 2)] for t in range(T)])
    for got, wave in zip(found, (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(np.asarray(got)[0, :, 0], rope.attention_factor * wave(angle), atol=1e-5)
    assert name == "none" or not np.allclose(angle, np.arange(T)[:, None] * 100.0 ** (-np.arange(0, K, 2) / K))


@pytest.mark.parametrize("lengths", [(4, 20), (12, 12)])
def test_packed_texts_turn_by_their_own_length(lengths):
    position = np.concatenate([np.arange(length) for length in lengths])[None]
    segment = np.repeat([1, 2], lengths)[None]
    together = rope_waves(position, segment, K, ROPES["dynamic"])
    start = 0
    for length in lengths:
        alone = rope_waves(np.arange(length)[None], np.ones((1, length), int), K, ROPES["dynamic"])
        for whole, part in zip(together, alone, strict=True):
            np.testing.assert_allclose(np.asarray(whole)[:, start : start + length], part, atol=1e-6)
        start += length


@pytest.mark.parametrize("name", ROPES)
def test_scores_depend_on_distance_alone(name):
    rng = np.random.default_rng(1)
    q, k = (np.broadcast_to(rng.normal(size=(1, 1, 1, K)), (1, T, 1, K)).astype(np.float32) for _ in range(2))
    waves = rope_waves(np.arange(T)[None], np.ones((1, T), int), K, ROPES[name])
    scores = np.asarray(rotate(q, waves))[0, :, 0] @ np.asarray(rotate(k, waves))[0, :, 0].T
    for distance in range(-5, 6):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert abs(scores[0, 0] - scores[0, 7]) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"theta": 1.0}, "rope.theta is 1.0; wanted more than 1"),
        ({"factor": 0.0}, "rope.factor is 0.0; wanted more than 0"),
        ({"made_for": 0}, "rope.made_for is 0"),
        ({"attention_factor": float("nan")}, "rope.attention_factor is nan"),
        ({"low_frequency": 4.0}, "rope.low_frequency 4.0 is not below high_frequency 4.0"),
    ],
)
def test_impossible_angles_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Rope(**change)


def test_a_growing_base_wants_more_than_one_wave():
    with pytest.raises(UserError, match="head_width is 2, of which 2 are rotated; wanted an even number from 4"):
        ModelConfig(head_width=2, rope=Rope(scaling="dynamic"))


def test_sinusoids_against_float64():
    got = sinusoids(np.array([[0, 1, 7], [3, 0, 500]]), 10)
    for (row, column), position in np.ndenumerate([[0, 1, 7], [3, 0, 500]]):
        for pair in range(5):
            angle = position / 10_000 ** (2 * pair / 10)
            wanted = [math.sin(angle), math.cos(angle)]
            np.testing.assert_allclose(got[row, column, 2 * pair : 2 * pair + 2], wanted, atol=3e-5)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (8, [2.0**-n for n in range(1, 9)]),  # the paper's own example
        (4, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]),
        (6, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]),  # those of 4, and every second one of 8
    ],
)
def test_alibi_falls_by_the_slopes_of_the_paper(heads, slopes):
    back = np.arange(5)[:, None] - np.arange(5)[None]
    wanted = [-slope * np.abs(back) for slope in slopes]
    np.testing.assert_allclose(alibi(heads, back[None]), np.array(wanted)[None], rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_single_when_near_and_logarithmic_beyond(causal):
    back = np.arange(-40, 41)[None]
    got = np.asarray(relative_buckets(back, 16, 32, causal))[0]
    for distance, bucket in zip(back[0], got, strict=True):
        half, side = (16, 0) if causal else (8, 8 if distance < 0 else 0)
        near = max(distance, 0) if causal else abs(int(distance))
        if near < half // 2:
            assert bucket == side + near
            continue
        exact = half // 2 + math.log(near / (half // 2)) / math.log(32 / (half // 2)) * (half - half // 2)
        assert bucket == side + min(int(exact + 1e-6), half - 1)
