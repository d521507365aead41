"""What follows a gist sees its places and not the prompt: against each example alone, behind its compressed prefix."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import BIASED, ENCODER, GEMMA, GPT2, LLAMA, T5, params_of, some_tokens

from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.models import Model, compressed
from kdjax.models.attention import see
from kdjax.models.config import GIST
from kdjax.models.gist import parted
from kdjax.shapes import View, gist_places

COUNT = 3
PARTS = (((5, 4), (7, 2)), ((9, 3),))
"""Tokens before and after the gist of each example, by row; the first row has two examples."""
LOCAL = replace(LLAMA, windows=(2, 6, 4))
CONFIGS = {"llama": LLAMA, "gemma": GEMMA, "local": LOCAL, "alibi": next(c for c in BIASED if c.positions == "alibi")}


def with_gist(config):
    """A model's parameters with a gist whose vectors are as large as its embeddings."""
    params = params_of(config)
    scale = np.std(np.asarray(params["embed"]["embedding"]))
    return params | {GIST: {"embedding": scale * jax.random.normal(jax.random.key(5), (COUNT, config.width))}}


def packed(change=0):
    """A view of the examples packed into rows, and each one's tokens before and after; `change` is added to prompts."""
    rows, examples, rng = np.zeros((3, len(PARTS), 32), np.int32), [], np.random.default_rng(2)
    for b, parts in enumerate(PARTS):
        at = 0
        for segment, (before, after) in enumerate(parts, 1):
            prompt = ((rng.integers(0, 97, before) + change) % 97).tolist()
            rest = rng.integers(0, 97, after).tolist()
            text = [*prompt, *gist_places(COUNT), *rest]
            rows[:, b, at : at + len(text)] = text, [segment] * len(text), range(len(text))
            examples.append((prompt, rest))
            at += len(text)
    return View(*map(jnp.asarray, rows)), examples


def following(hidden_BTD, view):
    """What is said of the tokens after each example's gist, in order."""
    tokens, segment = np.asarray(view.tokens_BT), np.asarray(view.segment_BT)
    found = []
    for b, number in [(row, n) for row in range(len(PARTS)) for n in range(1, len(PARTS[row]) + 1)]:
        places = np.flatnonzero(segment[b] == number)
        last = places[np.flatnonzero(tokens[b, places] < 0)[-1]]
        found.append(np.asarray(hidden_BTD)[b, last + 1 : places[-1] + 1])
    return found


def test_the_mask_is_that_of_the_paper():
    tokens = np.array([[7, 7, -1, -2, 8, 8, 5, -1, -2, 6, 0]])
    segment = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
    span = np.array([0, 0, 1, 1, 2, 2, 0, 1, 1, 2, 2])  # before, gist, after
    wanted = np.zeros((11, 11), bool)
    for q in range(11):
        for k in range(q + 1):
            hidden = span[q] == 2 and span[k] == 0
            wanted[q, k] = segment[0, q] == segment[0, k] and not hidden
    got = see(jnp.asarray(segment), jnp.asarray(segment)).past_gists(jnp.asarray(tokens) < 0).mask_B1TS
    np.testing.assert_array_equal(np.asarray(got)[0, 0], wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_follows_a_packed_gist_is_what_follows_its_compressed_prefix(name):
    model, params, (view, examples) = Model(CONFIGS[name]), with_gist(CONFIGS[name]), packed()
    prefix = compressed(model, params, [prompt for prompt, _ in examples])
    assert prefix.tokens == COUNT
    got = following(model.apply(params, view).hidden_BTD, view)
    for number, (_, rest) in enumerate(examples):
        own = jax.tree.map(lambda x, number=number: x[:, number : number + 1], prefix)
        alone = View(*(jnp.asarray([row]) for row in (rest, [1] * len(rest), range(len(rest)))))
        wanted = model.apply(params, alone, prefix=own).hidden_BTD[0]
        np.testing.assert_allclose(got[number], wanted, atol=2e-5, rtol=1e-5, err_msg=f"example {number}")


def test_a_changed_prompt_comes_through_the_gist_alone():
    model, params = Model(LLAMA), with_gist(LLAMA)
    one, other = (packed(change)[0] for change in (0, 1))
    got = [following(model.apply(params, view).hidden_BTD, view) for view in (one, other)]
    assert min(float(np.abs(a - b).max()) for a, b in zip(*got, strict=True)) > 1e-4


@pytest.mark.slow
def test_text_goes_on_behind_a_gist_as_behind_its_prefix():
    model, params, (_, examples) = Model(LLAMA), with_gist(LLAMA), packed()
    prompts = [[*prompt, *gist_places(COUNT), *rest] for prompt, rest in examples]
    got = generate(model, params, prompts, max_new_tokens=5)
    for (prompt, rest), said in zip(examples, got, strict=True):
        text = list(rest)
        for token in said:
            whole = [*prompt, *gist_places(COUNT), *text]
            view = View(*(jnp.asarray([row]) for row in (whole, [1] * len(whole), range(len(whole)))))
            logits = model.apply(params, view).hidden_BTD[0, -1] @ model.head(params).w_DV
            assert int(jnp.argmax(logits)) == token
            text.append(token)


def test_bad_input_is_one_line():
    params = with_gist(LLAMA)
    model = Model(LLAMA)
    for config, why in ((GPT2, "its positions are learned"), (ENCODER, "it is an encoder"), (T5, "encoder-decoder")):
        with pytest.raises(UserError, match=f"takes no gist: .*{why}"):
            config.check_gist()
    with pytest.raises(UserError, match="has no gist to compress a prompt to; train one with student.gist"):
        compressed(model, params_of(LLAMA), [[1]])
    for prompt, why in (([], "0 tokens to compress; wanted from 1 to"), ([97], "outside the model's vocabulary")):
        with pytest.raises(UserError, match=why):
            compressed(model, params, [prompt])
    with pytest.raises(UserError, match="prompt 1 has 2 places of a gist; wanted all 3 once"):
        parted([[1, -1, -2, -3, 2], [1, -1, -2, 2]], 3)
    prefix = compressed(model, params, some_tokens(1, 4).tolist())
    with pytest.raises(UserError, match="the prompts have a gist, and a prefix was given"):
        generate(model, params, [[1, *gist_places(COUNT), 2]], max_new_tokens=1, prefix=prefix)
    with pytest.raises(UserError, match="wants the kernel"):
        replace(model, attention=lambda *given: given[0]).apply(params, packed()[0])
