"""Log-probabilities of answers: those of float64 on each answer alone, however batched and wherever run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_speaker import CONFIG, speaker, weights

from kdjax.errors import UserError
from kdjax.models import Model
from kdjax.prompts import likelihood
from kdjax.prompts.likelihood import LEAST_ROWS, LEAST_SHARED, log_likelihoods, merged, shared_beginnings
from kdjax.shapes import View

TEXTS = [
    ("Is it so?", "yes"), ("Is it so?", "no"), ("Is it so?", "n"), ("x", "y"), ("Is it not so?", "yes"),
    ("a long question " * 6, "never"), ("so", "a long answer " * 4),
]  # fmt: skip


@jax.jit
def hidden(params, view):
    return Model(CONFIG).apply(params, view).hidden_BTD


def expected(prompt, answer):
    """The answer's log-probability in float64, from the hidden states of this text alone."""
    tokens = [*prompt.encode(), *b" ", *answer.encode()]
    position_BT = jnp.arange(128)[None]
    padded_BT = jnp.array([tokens + [0] * (128 - len(tokens))])
    view = View(padded_BT, (position_BT < len(tokens)).astype(jnp.int32), position_BT)
    hidden_TD = np.asarray(hidden(jax.tree.map(jnp.asarray, weights()), view)[0], np.float64)
    logits_TV = (hidden_TD @ np.asarray(Model(CONFIG).head(weights()).w_DV, np.float64))[:, : CONFIG.vocab_size]
    logits_TV -= logits_TV.max(1, keepdims=True)
    log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    return sum(log_probs_TV[place - 1, tokens[place]] for place in range(len(prompt), len(tokens)))


@pytest.fixture(scope="module")
def wanted():
    return [expected(*pair) for pair in TEXTS]


@pytest.mark.parametrize(
    ("devices", "batch_tokens"), [(1, 10_000), pytest.param(1, 64, marks=pytest.mark.slow), (8, 10_000)]
)
def test_likelihoods_are_those_of_float64_under_any_batching(wanted, devices, batch_tokens):
    tiny = speaker(devices, chat=False, batch_tokens=batch_tokens)
    weighed = tiny.weigh(TEXTS)
    np.testing.assert_allclose([w.log_prob for w in weighed], wanted, rtol=2e-5)
    assert len({round(value, 3) for value in wanted}) == len(TEXTS)
    assert [(w.prompt_tokens, w.answer_tokens) for w in weighed] == [(len(p), len(a) + 1) for p, a in TEXTS]
    np.testing.assert_allclose([w.log_prob for w in tiny.weigh(TEXTS[::-1])], wanted[::-1], rtol=2e-5)


def test_a_text_is_read_once_for_all_answers_in_it_and_few_shapes_are_compiled():
    batches = []

    def run(shared, asked):
        assert shared == ()
        batches.append(asked)
        return np.zeros(asked.tokens_BRP.shape)

    pairs = [([1] * length, [answer]) for length in range(40, 49) for answer in range(5)]
    pairs += [([2, 3], [4, 5, 6]), ([2, 3], [4, 7]), ([2], [3])]
    log_likelihoods(run, pairs, batch_tokens=400, most=48, unit=2)
    widths = [asked.view.tokens_BT.shape for asked in batches]
    assert widths == [(2, 48), (2, 32)]  # a text of 48 ones holds the shorter ones, and 2 3 4 5 what begins so
    assert int((batches[1].view.segment_BT > 0).sum()) == 4
    assert batches[0].tokens_BRP.shape == (2, 16, 8)
    batches.clear()
    log_likelihoods(run, [([n], [n]) for n in range(50)], batch_tokens=400, most=48, unit=2)
    assert [asked.view.tokens_BT.shape for asked in batches] == [(8, 32)] * 6 + [(2, 32)]


SHOTS = "Were they? yes. Is it not so? no. Was it so, and never otherwise? maybe. "
ASKED = [
    (f"{SHOTS}{end}", label) for end in ("Is it?", "Was it?", "It was so", "No", "") for label in ("yes", "no way")
]


@pytest.mark.parametrize("devices", [1, 8])
def test_what_many_prompts_begin_with_is_read_once(devices, monkeypatch):
    tiny, read = speaker(devices, chat=False, batch_tokens=256), []
    of_batch = tiny._log_probs

    def counted(params, prefix, asked):
        read.append((0 if prefix is None else prefix.tokens, int((np.asarray(asked.view.segment_BT) > 0).sum())))
        return of_batch(params, prefix, asked)

    monkeypatch.setitem(tiny.__dict__, "_log_probs", counted)
    pairs = [*ASKED, *TEXTS]
    weighed = tiny.weigh(pairs)
    np.testing.assert_allclose([w.log_prob for w in weighed], [expected(*pair) for pair in pairs], rtol=2e-5)
    assert [(w.prompt_tokens, w.answer_tokens) for w in weighed] == [(len(p), len(a) + 1) for p, a in pairs]
    behind = [tokens for held, tokens in read if held]
    assert {held for held, _ in read} == {0, LEAST_SHARED} and len(behind) > 1
    assert sum(behind) == sum(len(p) + len(a) - LEAST_SHARED for p, a in ASKED)


def test_rows_are_read_behind_the_beginnings_that_spare_most():
    many, few = [(1,) * 90 + (n, 3) for n in range(6)], [(2,) * 90 + (n,) for n in range(LEAST_ROWS - 1)]
    found = dict(shared_beginnings([*few, *many, (1,) * 50, (2, 7) * 90, (3, 4), ()]))
    assert found.keys() == {(1,) * 64, ()}
    assert found[(1,) * 64] == [3, 4, 5, 6, 7, 8] and sorted(found[()]) == [0, 1, 2, 9, 10, 11, 12]

    def lengths(begins):
        return [(len(shared), sorted(numbers)) for shared, numbers in shared_beginnings(begins)]

    of_two = [(1,) * 700 + (n,) for n in range(9)] + [(1,) * 400 + (5,) * 300 + (n,) for n in range(9)]
    assert lengths(of_two) == [(640, list(range(9))), (640, list(range(9, 18)))]
    tails = [(1,) * 400 + (n,) * 40 for n in range(3)]
    assert lengths([*of_two[:3], *tails]) == [(384, list(range(6)))]
    assert lengths([]) == [] and lengths([()] * 9) == [(0, list(range(9)))]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 200), st.integers(0, 9)), max_size=20))
def test_each_row_is_read_once_behind_what_it_begins_with(drawn):
    begins = [(first,) * length + (last,) * 3 for first, length, last in drawn]
    found = list(shared_beginnings(begins))
    assert sorted(number for _, numbers in found for number in numbers) == list(range(len(begins)))
    assert all(begins[number][: len(shared)] == shared for shared, numbers in found for number in numbers)
    assert all(len(numbers) >= LEAST_ROWS and len(shared) >= LEAST_SHARED for shared, numbers in found if shared)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12))
def test_what_begins_a_kept_text_is_not_kept(contexts):
    kept, row = merged(contexts)
    assert all(kept[number][: len(context)] == context for context, number in zip(contexts, row, strict=True))
    assert not any(a != b and b[: len(a)] == a for a in kept for b in kept)
    assert set(kept) <= set(contexts) and len(set(kept)) == len(kept)


def test_logits_exist_for_one_place_of_each_row_at_a_time():
    tiny = speaker(1)
    asked = likelihood.in_batch([((1,) * 60, {place: [7] for place in range(40)})], 4, 64)
    jaxpr = str(jax.make_jaxpr(lambda a: likelihood.log_probs(tiny.model, tiny.params, None, a))(asked))
    assert "4,264]" in jaxpr and "64,264]" not in jaxpr


def test_devices_read_their_own_rows():
    tiny = speaker(8)
    asked = tiny.place.put_batch(likelihood.in_batch([((1,) * 30, {20: [7]})] * 16, 16, 32))
    text = tiny._log_probs.lower(tiny.params, None, asked).compile().as_text()
    assert "2,32,16]" in text and "16,32,16]" not in text


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(UserError, match="longer than the 512 positions of tiny"):
        speaker(1, chat=False).weigh([("x" * 511, "ab")])
    with pytest.raises(UserError, match="empty"):
        speaker(1).weigh([("x", "")])
