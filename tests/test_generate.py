"""Decoding with a cache is the same as computing everything anew, for ragged batches too."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.generate import Sampling, choose, generate
from kdjax.losses import head_logits
from kdjax.models import Model, ModelConfig
from kdjax.shapes import View

LLAMA = ModelConfig(
    vocab_size=61, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48, max_positions=64
)
GPT2 = replace(
    LLAMA, family="gpt2", kv_heads=4, norm="layer", activation="gelu_tanh", gated_mlp=False, positions="learned",
    qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [60, 0]]


@cache
def sharp(config):
    """A random model whose next token depends clearly on what came before."""
    rng, shapes = np.random.default_rng(3), jax.eval_shape(Model(config).init, jax.random.key(0))

    def draw(path, shape):
        return jnp.asarray((path[-1].key == "scale") + 0.2 * rng.normal(size=shape.shape), jnp.float32)

    return Model(config), jax.tree_util.tree_map_with_path(draw, shapes)


@partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens_T, length):
    position_BT = jnp.arange(64)[None]
    view = View(tokens_T[None], (position_BT < length).astype(jnp.int32), position_BT)
    return head_logits(model.apply(params, view).hidden_BTD[0], model.head(params))


def greedy_anew(model, params, prompt, new):
    tokens_T = np.zeros(64, np.int32)
    tokens_T[: len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + new):
        token = int(all_logits(model, params, tokens_T, length)[length - 1].argmax())
        tokens_T[length : length + 1] = token
    return tokens_T[len(prompt) : len(prompt) + new].tolist()


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_greedy_equals_full_recomputation_and_batched_equals_alone(config):
    model, params = sharp(config)
    batched = generate(model, params, PROMPTS, max_new_tokens=7)
    assert batched == [greedy_anew(model, params, prompt, 7) for prompt in PROMPTS]
    assert batched == [generate(model, params, [prompt], max_new_tokens=7)[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in batched}) > 1


def test_rows_end_with_their_first_eos():
    model, params = sharp(LLAMA)
    free = generate(model, params, PROMPTS, max_new_tokens=7)
    eos = free[1][2]
    stopped = generate(model, params, PROMPTS, max_new_tokens=7, eos_ids=(eos,))
    assert stopped == [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len(stopped[1]) <= 3


def test_decoding_stops_when_all_rows_have_ended(monkeypatch):
    model, params = sharp(LLAMA)
    free = generate(model, params, PROMPTS[1:2], max_new_tokens=7)[0]
    computed = []
    monkeypatch.setattr("kdjax.generate._until_eos", lambda row, eos_ids: computed.append(row) or row)
    generate(model, params, PROMPTS[1:2], max_new_tokens=7, eos_ids=(free[2],))
    end = free.index(free[2]) + 1
    assert computed == [free[:end] + [0] * (7 - end)] and any(free[end:])


def test_sampling_is_repeatable_by_seed_and_row():
    model, params = sharp(LLAMA)
    draw = lambda seed, prompts=PROMPTS: generate(  # noqa: E731
        model, params, prompts, max_new_tokens=6, temperature=1.0, seed=seed
    )
    assert draw(1) == draw(1) and draw(1) != draw(2)
    assert draw(1, [PROMPTS[0], *PROMPTS[2:], PROMPTS[1]])[0] == draw(1)[0]
    same = draw(5, [PROMPTS[0]] * 4)
    assert len({tuple(row) for row in same}) > 1


def test_choose_draws_from_the_tempered_distribution():
    logits_V = np.array([2.0, 1.0, 0.0, -1.0, -9.0], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V)[None], (20_000, 5))

    def frequencies(**kwargs):
        return np.bincount(choose(logits_BV, Sampling(**kwargs), keys), minlength=5) / 20_000

    softmax = lambda x: np.exp(x) / np.exp(x).sum()  # noqa: E731
    np.testing.assert_allclose(frequencies(temperature=0.7), softmax(logits_V / 0.7), atol=0.015)
    top = np.where(np.arange(5) < 2, softmax(logits_V), 0)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_k=2), top / top.sum(), atol=0.015)
    # 0.64 and 0.24: the first two hold 0.8 together, the first alone does not.
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.8), top / top.sum(), atol=0.015)
    assert frequencies(temperature=0.0).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 60], {"max_new_tokens": 5}, "prompt 0 has 60 tokens and 5 new ones .* holds 64 positions"),
        ([[1], []], {"max_new_tokens": 5}, "prompt 1 is empty"),
        ([[1, 61]], {"max_new_tokens": 5}, "token 61, outside the model's vocabulary of 61"),
        ([[-1]], {"max_new_tokens": 5}, "token -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 1, "temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"max_new_tokens": 1, "top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"max_new_tokens": 1, "top_k": -2}, "top_k is -2"),
    ],
)
def test_bad_input_is_one_clear_line(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(Model(LLAMA), {}, prompts, **options)


def test_no_prompts_give_nothing():
    assert generate(Model(LLAMA), {}, [], max_new_tokens=3) == []


def test_the_last_position_can_be_filled():
    model, params = sharp(GPT2)
    prompt = [1] * 60
    assert generate(model, params, [prompt], max_new_tokens=4)[0] == greedy_anew(model, params, prompt, 4)


def test_bfloat16_decodes():
    _, params = sharp(LLAMA)
    rows = generate(Model(LLAMA, dtype="bfloat16"), params, PROMPTS, max_new_tokens=5)
    assert [len(row) for row in rows] == [5] * 4
