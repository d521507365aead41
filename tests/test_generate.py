"""Decoding with a cache is the same as computing everything anew, for ragged batches too."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import generate as decoding
from kdjax.errors import UserError
from kdjax.generate import BLOCK, Beside, generate, settled, stream
from kdjax.losses import head_logits
from kdjax.models import Model, ModelConfig
from kdjax.models.config import Rope
from kdjax.sampling import Sampling, choose
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
    numbers, decode = [], decoding._decode

    def counted(*arguments):
        state, block_BN = decode(*arguments)
        numbers.append(int(state.number))
        return state, block_BN

    monkeypatch.setattr(decoding, "_decode", counted)
    generate(model, params, PROMPTS[1:2], max_new_tokens=7, eos_ids=(free[2],))
    assert numbers == [free.index(free[2]) + 1]
    assert len(free) == 7


def test_blocks_are_what_is_generated_at_once():
    model, params = sharp(LLAMA)
    whole, options = 2 * BLOCK + 5, {"max_new_tokens": 2 * BLOCK + 5}
    eos = (generate(model, params, PROMPTS[1:2], **options)[0][BLOCK + 3],)
    blocks = list(stream(model, params, PROMPTS, eos_ids=eos, **options))
    rows = [sum((block[row] for block in blocks), []) for row in range(len(PROMPTS))]
    assert rows == generate(model, params, PROMPTS, eos_ids=eos, **options)
    assert rows == [generate(model, params, [prompt], eos_ids=eos, **options)[0] for prompt in PROMPTS]
    assert [max(map(len, block)) for block in blocks] == [1, BLOCK, BLOCK, 4]
    assert any(len(row) < whole for row in rows) and max(map(len, rows)) == whole


SHARED = [int(token) for token in np.random.default_rng(7).integers(0, 61, 37)]
LONG = replace(LLAMA, max_positions=128)
PREFIXED = {
    "rope": LONG,
    "learned": replace(GPT2, max_positions=128),
    "alibi": replace(LONG, positions="alibi"),
    "relative": replace(LONG, positions="relative"),
    "windows": replace(LONG, windows=(5, 0), local_rope=Rope(theta=100.0)),
    "mixture": replace(LONG, experts=4, experts_per_token=2),
}


@pytest.mark.parametrize("name", PREFIXED)
def test_a_shared_prefix_is_computed_once_and_changes_nothing(name, monkeypatch):
    model, params = sharp(PREFIXED[name])
    prompts, spread = [SHARED + prompt for prompt in PROMPTS], []
    monkeypatch.setattr(decoding, "_spread", lambda *a, f=decoding._spread: spread.append(a[0].tokens) or f(*a))
    rows = generate(model, params, prompts, max_new_tokens=6)
    assert spread == [32]
    assert rows == [generate(model, params, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len({tuple(row) for row in rows}) > 1
    assert spread == [32]


def test_angles_that_go_by_length_share_no_prefix(monkeypatch):
    rope = Rope(scaling="dynamic", factor=4.0, made_for=8)
    model, params = sharp(replace(LONG, rope=rope))
    monkeypatch.delattr(decoding, "_spread")
    prompts = [SHARED + prompt for prompt in PROMPTS]
    rows = generate(model, params, prompts, max_new_tokens=3)
    assert rows == [generate(model, params, [prompt], max_new_tokens=3)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("text", "is_over", "expected"),
    [
        ("one two", False, ("one two", False)),
        ("one EN", False, ("one ", False)),
        ("one EN", True, ("one EN", True)),
        ("one END of it", False, ("one ", True)),
        ("a\n\nEND", False, ("a", True)),
        ("a\n", False, ("a", False)),
        ("caf\N{REPLACEMENT CHARACTER}", False, ("caf", False)),
        ("caf\N{REPLACEMENT CHARACTER}", True, ("caf\N{REPLACEMENT CHARACTER}", True)),
    ],
)
def test_only_what_cannot_change_is_shown(text, is_over, expected):
    assert settled(text, ["END", "\n\n"], is_over) == expected


def test_sampling_is_repeatable_by_seed_and_row():
    model, params = sharp(LLAMA)
    draw = lambda seed, prompts=PROMPTS: generate(  # noqa: E731
        model, params, prompts, max_new_tokens=6, sampling=Sampling(temperature=1.0), seed=seed
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
    # e^-1 of the likeliest is 0.37: only the second is as likely as 0.3 of it.
    np.testing.assert_allclose(frequencies(temperature=1.0, min_p=0.3), top / top.sum(), atol=0.015)
    assert frequencies(temperature=1.0, top_k=4, top_p=0.99, min_p=0.9)[0] == 1
    assert frequencies(temperature=0.0).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 60], {"max_new_tokens": 5}, "prompt 0 has 60 tokens and 5 new ones .* holds 64 positions"),
        ([[1], []], {"max_new_tokens": 5}, "prompt 1 is empty"),
        ([[1, 61]], {"max_new_tokens": 5}, "token 61, outside the model's vocabulary of 61"),
        ([[-1]], {"max_new_tokens": 5}, "token -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 1, "sampling": Sampling(temperature=-1.0)}, "temperature is -1.0"),
        ([[1]], {"max_new_tokens": 1, "sampling": Sampling(top_p=0.0)}, "top_p is 0.0"),
        ([[1]], {"max_new_tokens": 1, "sampling": Sampling(top_k=-2)}, "top_k is -2"),
        ([[1]], {"max_new_tokens": 1, "sampling": Sampling(min_p=1.5)}, "min_p is 1.5"),
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


def test_two_models_draw_a_token_together_each_behind_its_own_prompt():
    """As drawn from the mixture of their softened distributions, computed anew at every token."""
    model, params = sharp(LLAMA)
    other, theirs = sharp(GPT2)
    prompts, behind, share, sampling = PROMPTS[:2], [[1, 2, 3, 5], [9, 9]], 0.4, Sampling(0.8)
    said = generate(
        model, params, prompts, max_new_tokens=6, sampling=sampling, seed=3,
        beside=Beside(other, theirs, behind, share),
    )  # fmt: skip
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(3)))(jnp.arange(2))
    for row, answer in enumerate(said):
        for number, token in enumerate(answer):
            logs = []
            for one, tree, prompt in ((model, params, prompts[row]), (other, theirs, behind[row])):
                text = np.zeros(64, np.int32)
                text[: len(prompt) + number] = [*prompt, *answer[:number]]
                at = len(prompt) + number
                logs.append(jax.nn.softmax(all_logits(one, tree, text, at)[at - 1] / 0.8))
            mixed = jnp.log((1 - share) * logs[0] + share * logs[1])
            assert token == int(jax.random.categorical(jax.random.fold_in(keys[row], number), mixed))
    alone = generate(model, params, prompts, max_new_tokens=6, sampling=sampling, seed=3)
    assert said != alone
