"""What is kept of a teacher's says: the same again, to a bound that is told, in as few bytes as are promised."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from kdjax.data.signals import (
    KINDS,
    Settings,
    dequantised,
    error,
    id_bits,
    pack_ids,
    packed,
    quantise,
    unpack_ids,
    unpacked,
)
from kdjax.errors import UserError

N, V = 7, 300


def logs(random, n=N):
    x_NV = random.normal(size=(n, V)) * 4
    return (x_NV - np.log(np.exp(x_NV).sum(1, keepdims=True))).astype(np.float32)


def said(kind, picks=9):
    random = np.random.default_rng(0)
    log_probs_NV = logs(random)
    if kind == "hidden":
        return {"hidden": random.normal(size=(N, 16)).astype(np.float32) * 30}
    if kind == "topk":
        ids_NP = np.argsort(-log_probs_NV, 1)[:, :picks].astype(np.int32)
        rest = {"log_tail": np.full(N, -2.5, np.float32), "log_z": np.full(N, 7.25, np.float32)}
    else:
        rest, ids_NP = (
            {},
            np.stack([random.choice(V, picks, p=np.exp(row) / np.exp(row).sum()) for row in log_probs_NV]),
        )
    return {"ids": ids_NP.astype(np.int32), "log_probs": np.take_along_axis(log_probs_NV, ids_NP, 1)} | rest


@settings(max_examples=60, deadline=None)
@given(some.integers(1, 200_000), some.data())
def test_entries_come_back_from_their_bits(vocab_size, drawn):
    ids = np.array(drawn.draw(some.lists(some.integers(0, vocab_size - 1), min_size=1, max_size=40)), np.int32)
    kept = pack_ids(ids, vocab_size)
    np.testing.assert_array_equal(unpack_ids(kept, len(ids), vocab_size), ids)
    assert len(kept) == -(-len(ids) * id_bits(vocab_size) // 8)


def test_an_entry_takes_as_many_bits_as_its_vocabulary_needs():
    assert [id_bits(v) for v in (2, 49_152, 65_536, 65_537, 151_936)] == [1, 16, 16, 17, 18]


@pytest.mark.parametrize("bits", [8, 16])
def test_no_value_is_further_off_than_half_a_step(bits):
    values_NP = logs(np.random.default_rng(1))
    kept = quantise(values_NP, bits)
    step_N = (kept["high"].astype(float) - kept["low"].astype(float)) / (2**bits - 1)
    ends = np.abs(values_NP).max() * 2.0**-11  # float16's rounding of the lowest and the highest
    off_N = np.abs(dequantised(kept, bits) - values_NP).max(1)
    assert np.all(off_N <= step_N / 2 + ends + 1e-6) and off_N.max() > step_N.min() / 4


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_said_is_there_again(kind, bits):
    how, whole = Settings(V, bits, 9), said(kind)
    found = unpacked(kind, packed(kind, whole, 5, how), N, how)
    assert all(not np.any(x[5:]) for x in found.values())  # the last two are not compared
    off = error(kind, whole, packed(kind, whole, 5, how), how)
    if kind == "hidden":
        np.testing.assert_allclose(found["hidden"][:5], whole["hidden"][:5], atol=off * 1.001)
        assert 0 < off < np.abs(whole["hidden"]).max() * (0.5 / 127 if bits == 8 else 2.0**-8) * 1.001
        return
    assert off < (0.05 if bits == 8 else 0.01)
    if kind == "topk":
        np.testing.assert_array_equal(found["ids"][:5], whole["ids"][:5])
        np.testing.assert_allclose(found["log_probs"][:5], whole["log_probs"][:5], atol=off * 1.001)
        np.testing.assert_allclose(found["log_tail"][:5], whole["log_tail"][:5])
        return
    for n in range(5):  # draws of one entry are put together, and weigh as many
        ids, times = np.unique(whole["ids"][n], return_counts=True)
        weighs = found["weights"][n] > 0
        np.testing.assert_array_equal(found["ids"][n][weighs], ids)
        np.testing.assert_allclose(found["weights"][n][weighs], times / 9)
        of_id = dict(zip(whole["ids"][n], whole["log_probs"][n], strict=True))
        wanted = [of_id[i] for i in ids]
        np.testing.assert_allclose(found["log_probs"][n][weighs], wanted, atol=off * 1.001)


def test_bfloat16_loses_nothing_of_bfloat16():
    whole = {"hidden": said("hidden")["hidden"].astype(ml_dtypes.bfloat16)}
    how = Settings(V, 16)
    assert error("hidden", whole, packed("hidden", whole, N, how), how) == 0


def test_logs_that_float16_cannot_hold_are_cut():
    whole = said("topk") | {"log_probs": np.full((N, 9), -1e6, np.float32)}
    found = unpacked("topk", packed("topk", whole, N, Settings(V, 16, 9)), N, Settings(V, 16, 9))
    assert np.all(np.isfinite(found["log_probs"])) and found["log_probs"].max() <= -59_000


def test_twelve_draws_take_fewer_than_forty_bytes_where_some_are_the_same():
    """Of a vocabulary of 49,152: at most 12 entries of 16 bits, each drawn so often, its logarithm, and both ends."""
    worst = {"ids": np.arange(12 * N, dtype=np.int32).reshape(N, 12), "log_probs": np.full((N, 12), -3.0, np.float32)}
    each = sum(x.nbytes for x in packed("sampled", worst, N, Settings(49_152, 8, 12)).values()) / N
    assert each == 1 + 12 * (2 + 1 + 1) + 4
    half = worst | {"ids": worst["ids"] // 2}
    assert sum(x.nbytes for x in packed("sampled", half, N, Settings(49_152, 8, 12)).values()) / N == 1 + 6 * 4 + 4


def test_more_than_a_row_has_is_refused():
    how = Settings(V, 16, 9)
    with pytest.raises(UserError, match="says something of 7 positions, but has 3"):
        unpacked("topk", packed("topk", said("topk"), N, how), 3, how)
