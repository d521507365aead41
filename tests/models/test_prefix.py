"""What stands before every example of a packed row, computed once: the same as its tokens in front of each."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import BIASED, ENCODER, GEMMA, GPT2, LLAMA, MOE, T5, params_of, plain_view, run, some_tokens

from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.models import Model, Prefix, open_model, prefix_of
from kdjax.models.config import Rope
from kdjax.shapes import View

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = [
    "llama_3",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt2",
    "mixtral",
    "smollm3",
    "olmo2",
    "gpt_neox",
    "phi3",
]
YARN = replace(LLAMA, rope=Rope(1e3, "yarn", 4.0, made_for=16), kv_heads=1)
LOCAL = replace(LLAMA, windows=(2, 4, 7))
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "gemma": GEMMA, "moe": MOE, "yarn": YARN, "local": LOCAL}
CONFIGS |= {config.positions: config for config in BIASED}
LENGTHS = ((3, 4), (6,), ())
"""Tokens of the examples in each row of eight; the last row is padding."""
PROMPT = some_tokens(1, 5, seed=9)[0].tolist()


def packed(head=()):
    """A view of the examples, each behind `head`, in rows with two more tokens than they need."""
    width, rng = 8 + 2 * len(head), np.random.default_rng(1)
    rows = np.zeros((3, len(LENGTHS), width), np.int32)
    rows[0] = 11  # what padding holds must not matter
    for b, lengths in enumerate(LENGTHS):
        at = 0
        for segment, length in enumerate(lengths, 1):
            text = [*head, *rng.integers(0, 97, length)]
            rows[:, b, at : at + len(text)] = text, [segment] * len(text), range(len(text))
            at += len(text)
    return View(*rows)


def examples(hidden_BTD, view, skip=0):
    """What is said of each real token but the first `skip` of an example, in order."""
    return np.asarray(hidden_BTD)[(view.segment_BT > 0) & (view.position_BT >= skip)]


def check(model, params, atol=1e-5):
    prefix = prefix_of(model, params, PROMPT)
    assert prefix.tokens == 5 and prefix.k_LBPGK.shape[:3] == (model.config.layers, 1, 5)
    got = run(model, params, packed(), prefix=prefix).hidden_BTD
    assert np.isfinite(got).all()
    wanted = examples(run(model, params, packed(PROMPT)).hidden_BTD, packed(PROMPT), 5)
    np.testing.assert_allclose(examples(got, packed()), wanted, atol=atol * max(1, np.abs(wanted).max()))
    if model.config == LLAMA:
        without = run(model, params, packed()).hidden_BTD
        assert np.abs(examples(without, packed()) - wanted).max(-1).min() > 1e-4


EVERY_TIME = {"llama", "gemma", "local", "alibi"}
"""Architectures whose test is not slow: those between which windows, rotary angles and biases differ."""


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, id=name, marks=() if name in EVERY_TIME else pytest.mark.slow) for name, c in CONFIGS.items()],
)
def test_a_prefix_is_the_prompts_tokens_before_each_example(config):
    check(Model(config), params_of(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_so_in_every_family(name):
    file = open_model(str(GOLDEN / name))
    check(Model(file.config), jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), file.tensors))


def test_a_window_counts_from_the_example_and_not_from_the_row():
    config = replace(LLAMA, layers=1, windows=(4,))
    model, params = Model(config), params_of(config)
    prefix = prefix_of(model, params, PROMPT)
    for slot, reached in ((0, []), (2, [0]), (3, [0, 1]), (4, [0, 1, 2])):
        moved = replace(prefix, v_LBPGK=prefix.v_LBPGK.at[:, :, slot].add(1.0))
        before, after = (run(model, params, packed(), prefix=p).hidden_BTD for p in (prefix, moved))
        changed = np.abs(after - before).max(-1) > 1e-6
        assert [np.flatnonzero(row).tolist() for row in changed] == [reached + [3 + n for n in reached], reached, []]


@pytest.mark.parametrize(
    ("config", "remat"), [(LOCAL, "none"), pytest.param(GEMMA, "full", marks=pytest.mark.slow)], ids=["local", "gemma"]
)
def test_gradients_go_through_the_prefix_as_through_the_tokens(config, remat):
    model, params = Model(config, remat=remat), params_of(config)
    weight_ND = np.random.default_rng(2).normal(size=(13, 32)).astype(np.float32)

    def loss(params, view, skip, prefix):
        at = np.nonzero((view.segment_BT > 0) & (view.position_BT >= skip))
        prefix = prefix_of(model, params, PROMPT) if prefix else None
        return (jnp.sin(model.apply(params, view, prefix=prefix).hidden_BTD[at]) * weight_ND).sum()

    got = jax.jit(jax.grad(lambda p: loss(p, packed(), 0, True)))(params)
    wanted = jax.jit(jax.grad(lambda p: loss(p, packed(PROMPT), 5, False)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), got, wanted)


def test_the_gradient_in_a_prefix_of_each_row_is_the_slope():
    model, params, rng = Model(LLAMA), params_of(LLAMA), np.random.default_rng(4)
    draw = lambda: jnp.asarray(0.5 * rng.normal(size=(3, 3, 5, 2, 8)), jnp.float32)  # noqa: E731
    prefix, step = Prefix(draw(), draw()), Prefix(draw(), draw())
    weight_BTD = rng.normal(size=(3, 8, 32)).astype(np.float32)

    def total(prefix):
        return (model.apply(params, packed(), prefix=prefix).hidden_BTD * weight_BTD).sum()

    jitted = jax.jit(total)
    near, grads = 1e-2, jax.jit(jax.grad(total))(prefix)
    slope = sum(float((g * s).sum()) for g, s in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True))
    before, after = (float(jitted(jax.tree.map(lambda a, b, t=t: a + t * b, prefix, step))) for t in (-near, near))
    assert abs(slope) > 0.1 and (after - before) / (2 * near) == pytest.approx(slope, rel=1e-2)
    assert not grads.k_LBPGK[:, 2].any() and not grads.v_LBPGK[:, 2].any()  # a row of padding
    assert np.abs(grads.k_LBPGK[:, :2]).min() > 0 and np.isfinite(grads.k_LBPGK).all()


def test_each_row_can_have_its_own():
    model, params = Model(GPT2), params_of(GPT2)
    prefixes = [prefix_of(model, params, tokens) for tokens in (PROMPT, PROMPT[::-1], PROMPT)]
    own = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *prefixes)
    got = run(model, params, packed(), prefix=own).hidden_BTD
    for row, prefix in enumerate(prefixes):
        np.testing.assert_allclose(got[row], run(model, params, packed(), prefix=prefix).hidden_BTD[row], atol=1e-5)
    assert np.abs(run(model, params, packed(), prefix=prefixes[0]).hidden_BTD[1] - got[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["gemma", pytest.param("alibi", marks=pytest.mark.slow)])
def test_it_goes_with_a_cache_and_behind_another(name):
    model, params, view = Model(CONFIGS[name]), params_of(CONFIGS[name]), plain_view(some_tokens(2, 8))
    prefix = prefix_of(model, params, PROMPT)
    whole = run(model, params, view, prefix=prefix).hidden_BTD
    cache, parts = model.empty_cache(2, 9), []
    for start, stop in ((0, 6), (6, 8)):
        part = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], view)
        output = run(model, params, part, cache=cache, prefix=prefix)
        cache, parts = output.cache, [*parts, output.hidden_BTD]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    twice = prefix_of(model, params, PROMPT[2:], prefix_of(model, params, PROMPT[:2]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), twice, prefix)


def test_it_is_in_the_compute_dtype_and_bfloat16_is_close():
    params, model = params_of(LLAMA), Model(LLAMA, dtype="bfloat16")
    prefix = prefix_of(model, params, PROMPT)
    assert prefix.k_LBPGK.dtype == prefix.v_LBPGK.dtype == jnp.bfloat16
    got = run(model, params, packed(), prefix=prefix).hidden_BTD
    whole = run(Model(LLAMA), params, packed(), prefix=prefix_of(Model(LLAMA), params, PROMPT)).hidden_BTD
    assert got.dtype == jnp.bfloat16 and whole.dtype == jnp.float32
    assert 0 < np.abs(examples(got.astype(jnp.float32), packed()) - examples(whole, packed())).max() < 0.1


DYNAMIC = replace(LLAMA, rope=Rope(scaling="dynamic", factor=4.0))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5, "it is an encoder-decoder"),
        (ENCODER, "it is an encoder, where"),
        (DYNAMIC, "rotary angles .dynamic. go by"),
    ],
    ids=["encoder-decoder", "encoder", "dynamic"],
)
def test_a_model_whose_prompt_depends_on_what_follows_takes_none(config, said):
    prefix = Prefix(*(np.zeros((3, 1, 5, config.kv_heads, 8), np.float32),) * 2)
    for use in (
        lambda: prefix_of(Model(config), params_of(config), PROMPT),
        lambda: Model(config).apply(params_of(config), packed(), prefix=prefix),
    ):
        with pytest.raises(UserError, match=f"takes no prefix: .*{said}.*put the prompt into each row") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "has 0 tokens; wanted from 1 to 64"),
        ([1] * 65, "has 65 tokens"),
        ([1, 97], "has token 97, outside"),
        ([-1], "-1"),
    ],
)
def test_a_prompt_that_is_none_is_refused(tokens, said):
    with pytest.raises(UserError, match=said):
        prefix_of(Model(GPT2), params_of(GPT2), tokens)


@pytest.mark.parametrize("shape", [(2, 1, 5, 2, 8), (3, 2, 5, 2, 8), (3, 1, 5, 4, 8), (3, 1, 5, 2, 4)])
def test_a_prefix_of_another_model_is_refused(shape):
    good = jnp.zeros((3, 1, 5, 2, 8))
    for arrays, name in (((jnp.zeros(shape), good), "keys"), ((good, jnp.zeros(shape)), "values")):
        with pytest.raises(UserError, match=rf"the prefix's {name} have shape .*wanted \[3 layers, 1 or 3 rows, 5 tok"):
            Model(LLAMA).apply(params_of(LLAMA), packed(), prefix=Prefix(*arrays))


GENERATED = {"rope": replace(LLAMA, windows=(5, 0, 9)), "learned": GPT2, "alibi": replace(LLAMA, positions="alibi")}
PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [60, 0]]


def sharp(config):
    """Parameters by which the next token depends clearly on what came before."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key == "scale" else 4 * x, params_of(replace(config, dropout=0.0))
    )


@pytest.mark.parametrize(
    "name", ["rope", *(pytest.param(name, marks=pytest.mark.slow) for name in ("learned", "alibi"))]
)
def test_what_is_generated_behind_a_prefix_is_what_follows_its_tokens(name):
    config = replace(GENERATED[name], max_positions=128)
    model, params = Model(config), sharp(config)
    prefix = prefix_of(model, params, PROMPT)
    got = generate(model, params, PROMPTS, max_new_tokens=6, prefix=prefix)
    assert got == generate(model, params, [PROMPT + prompt for prompt in PROMPTS], max_new_tokens=6)
    assert len({tuple(row) for row in got}) > 1


@pytest.mark.slow
def test_a_prefix_stands_before_what_prompts_share():
    config = replace(GENERATED["rope"], max_positions=128)
    model, params = Model(config), sharp(config)
    longer = [some_tokens(1, 33, seed=5)[0].tolist() + prompt for prompt in PROMPTS]
    rows = generate(model, params, longer, max_new_tokens=6, prefix=prefix_of(model, params, PROMPT))
    assert rows == [generate(model, params, [PROMPT + prompt], max_new_tokens=6)[0] for prompt in longer]


def test_a_prefix_counts_among_the_positions():
    model, params = Model(replace(GPT2, max_positions=12)), params_of(replace(GPT2, max_positions=12))
    prefix = prefix_of(model, params, PROMPT)
    assert len(generate(model, params, [[1, 2]], max_new_tokens=5, prefix=prefix)[0]) == 5
    with pytest.raises(
        UserError, match="has 2 tokens behind a prefix of 5 and 6 new ones were asked for; the model holds 12"
    ):
        generate(model, params, [[1, 2]], max_new_tokens=6, prefix=prefix)
