"""A soft prompt is what its tokens would be before each example, has their gradient, and is PEFT's on disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_prefix import CONFIGS, GENERATED, PROMPT, PROMPTS, examples, packed, sharp
from test_transformer import ENCODER, GPT2, LLAMA, T5, params_of, plain_view, run, some_tokens

from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.models import Model, ModelFile, ModelSpec, Prefix, bare, open_model, prefix_of
from kdjax.models.adapter import ADAPTER, WEIGHTS, export_soft_prompt, tensors_of
from kdjax.models.config import SOFT_PROMPT, SoftPrompt
from kdjax.models.files import map_safetensors, write_safetensors
from kdjax.models.model_file import lazy
from kdjax.models.soft_prompt import axes_of, check_fits, init_random, kept_of, of_tokens, slots, text_of

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("prompt", "prefix")


def soft(kind, tokens=5):
    return SoftPrompt(tokens, kind, "prompt", "text")


def behind(model, params, kind, tokens=5, ids=PROMPT):
    return params | of_tokens(soft(kind, tokens), model, params, ids)


def random_soft(kind, config=LLAMA, tokens=5, scale=0.5):
    rng, empty = np.random.default_rng(3), init_random(SoftPrompt(tokens, kind), config, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), empty)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n != "llama")],
)
def test_a_texts_own_vectors_are_its_tokens_before_each_example(name, kind):
    model, params = Model(CONFIGS[name]), params_of(CONFIGS[name])
    whole = behind(model, params, kind)
    assert slots(whole) == 5 and slots(params) == 0 and bare(whole) == params
    got = examples(run(model, whole, packed()).hidden_BTD, packed())
    wanted = examples(run(model, params, packed(PROMPT)).hidden_BTD, packed(PROMPT), 5)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))
    without = examples(run(model, params, packed()).hidden_BTD, packed())
    assert np.abs(got - without).max(-1).min() > 1e-4


@pytest.mark.slow
def test_vectors_have_the_gradient_of_their_tokens_embeddings():
    """Of a prompt whose tokens occur nowhere else, before each example anew: their gradients add up."""
    own = list(range(97, 102))
    config = replace(LLAMA, vocab_size=102, layers=2)
    model, params = Model(config), params_of(config)
    weight_ND = np.random.default_rng(2).normal(size=(13, 32)).astype(np.float32)

    def loss(params, view, skip):
        at = np.nonzero((view.segment_BT > 0) & (view.position_BT >= skip))
        return (jnp.sin(model.apply(params, view).hidden_BTD[at]) * weight_ND).sum()

    got = jax.jit(jax.grad(lambda p: loss(p, packed(), 0)))(behind(model, params, "prompt", ids=own))
    wanted = jax.jit(jax.grad(lambda p: loss(p, packed(own), 5)))(params)["embed"]["embedding"][97:]
    assert np.abs(wanted).min() > 0
    np.testing.assert_allclose(got[SOFT_PROMPT]["embedding"], wanted, atol=2e-5 * np.abs(wanted).max())
    assert not got["embed"]["embedding"][97:].any()


@pytest.mark.slow
def test_keys_and_values_have_the_gradient_that_is_the_slope():
    model, params, own, rng = Model(LLAMA), params_of(LLAMA), random_soft("prefix"), np.random.default_rng(4)
    weight_BTD = rng.normal(size=(3, 8, 32)).astype(np.float32)
    step = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), own)
    total = jax.jit(lambda own: (model.apply(params | own, packed()).hidden_BTD * weight_BTD).sum())
    near, grads = 1e-2, jax.jit(jax.grad(total))(own)
    slope = sum(float((g * s).sum()) for g, s in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True))
    before, after = (float(total(jax.tree.map(lambda a, b, t=t: a + t * b, own, step))) for t in (-near, near))
    assert abs(slope) > 0.1 and (after - before) / (2 * near) == pytest.approx(slope, rel=1e-2)
    assert all(np.abs(leaf).max(-1).min() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("config", [LLAMA, pytest.param(GPT2, marks=pytest.mark.slow)], ids=["rope", "learned"])
def test_of_a_longer_text_the_last_tokens_are_kept_as_far_from_what_follows(config):
    text = some_tokens(1, 11, seed=9)[0].tolist()
    assert kept_of(11, 4).tolist() == [0, 8, 9, 10] and kept_of(11, 11).tolist() == list(range(11))
    assert kept_of(11, 1).tolist() == [0]
    model, params = Model(config), params_of(config)
    whole, kept = prefix_of(model, params, text), kept_of(11, 4)
    short = Prefix(whole.k_LBPGK[:, :, kept], whole.v_LBPGK[:, :, kept])
    view = replace(packed(), position_BT=packed().position_BT + (7 if config is LLAMA else 0))
    wanted = run(model, params, view, prefix=short).hidden_BTD
    got = run(model, behind(model, params, "prefix", 4, text), packed()).hidden_BTD
    np.testing.assert_allclose(got, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))
    embedding = of_tokens(soft("prompt", 4), model, params, text)[SOFT_PROMPT]["embedding"]
    np.testing.assert_array_equal(embedding, params["embed"]["embedding"][np.array(text)[kept]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rope", "learned"])
def test_what_is_generated_behind_it_is_what_follows_its_tokens(name, kind):
    config = replace(GENERATED[name], max_positions=128)
    model, params = Model(config), sharp(config)
    whole = behind(model, params, kind)
    got = generate(model, whole, PROMPTS, max_new_tokens=6)
    assert got == generate(model, params, [PROMPT + prompt for prompt in PROMPTS], max_new_tokens=6)
    assert len({tuple(row) for row in got}) > 1
    longer = [some_tokens(1, 33, seed=5)[0].tolist() + prompt for prompt in PROMPTS[:2]]
    wanted = generate(model, params, [PROMPT + prompt for prompt in longer], max_new_tokens=6)
    assert generate(model, whole, longer, max_new_tokens=6) == wanted


@pytest.mark.slow
def test_a_prefix_and_a_cache_stand_behind_it():
    config = CONFIGS["local"]  # windows go by the order of slots
    model, params, view = Model(config), params_of(config), plain_view(some_tokens(2, 8))
    wanted = run(model, params, view, prefix=prefix_of(model, params, PROMPT)).hidden_BTD
    whole = behind(model, params, "prompt", 2, PROMPT[:2])
    rest = prefix_of(model, whole, PROMPT[2:])
    assert rest.tokens == 3
    np.testing.assert_allclose(run(model, whole, view, prefix=rest).hidden_BTD, wanted, atol=1e-5)
    each = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), rest)
    np.testing.assert_allclose(run(model, whole, view, prefix=each).hidden_BTD, wanted, atol=1e-5)
    whole, cache, parts = behind(model, params, "prompt"), model.empty_cache(2, 9), []
    for start, stop in ((0, 6), (6, 8)):
        part = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], view)
        output = run(model, whole, part, cache=cache)
        cache, parts = output.cache, [*parts, output.hidden_BTD]
    np.testing.assert_allclose(np.concatenate(parts, 1), wanted, atol=1e-5)


def test_it_counts_among_the_positions():
    config = replace(GPT2, max_positions=12)
    model, params = Model(config), params_of(config)
    whole = behind(model, params, "prefix")
    assert len(generate(model, whole, [[1, 2]], max_new_tokens=5)[0]) == 5
    with pytest.raises(UserError, match="has 2 tokens behind a prefix of 5 and 6 new ones were asked for"):
        generate(model, whole, [[1, 2]], max_new_tokens=6)
    with pytest.raises(UserError, match="has 13 tokens; wanted from 1 to 12"):
        prefix_of(model, whole, [1] * 8)


def test_a_random_one_differs_from_leaf_to_leaf_and_needs_no_axes_of_its_own():
    made = init_random(SoftPrompt(4, "prefix"), LLAMA, jax.random.key(0))
    assert {name: leaf.shape for name, leaf in made[SOFT_PROMPT].items()} == dict.fromkeys("kv", (3, 4, 2, 8))
    k, v = (made[SOFT_PROMPT][name] for name in "kv")
    assert np.std(k) == pytest.approx(0.02, rel=0.2) and not np.allclose(k, v)
    assert init_random(SoftPrompt(), LLAMA, jax.random.key(0)) == {}
    axes = axes_of(Model(LLAMA), made)
    assert axes[SOFT_PROMPT] == dict.fromkeys("kv", (None,) * 4) and bare(axes) == Model(LLAMA).logical_axes()


@pytest.mark.parametrize("config", [T5, ENCODER], ids=["encoder-decoder", "encoder"])
def test_a_model_that_takes_no_prefix_takes_no_soft_prompt(config):
    for kind in KINDS:
        with pytest.raises(UserError, match="takes no prefix: it is an encoder"):
            Model(config).apply(params_of(config) | random_soft(kind, config), packed())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tokens": -2}, "soft_prompt.tokens is -2"),
        ({"tokens": -1}, "wanted at least 0, or -1 with start 'prompt'"),
        ({"tokens": 3, "start": "prompt"}, "wanted a text with start 'prompt'"),
        ({"tokens": 3, "text": "Be brief."}, "and none with another"),
    ],
)
def test_values_that_make_none_are_refused(values, said):
    with pytest.raises(UserError, match=said) as caught:
        SoftPrompt(**values)
    assert "\n" not in str(caught.value)


def test_its_text_can_be_a_file(tmp_path):
    (tmp_path / "text.txt").write_text("Be brief.\n")
    assert text_of(SoftPrompt(2, start="prompt", text=f"@{tmp_path / 'text.txt'}")) == "Be brief.\n"
    (tmp_path / "text.txt").write_text("")
    for path, said in ((tmp_path / "text.txt", "is empty; write"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(UserError, match=f"student.soft_prompt.text .*{said}"):
            text_of(SoftPrompt(2, start="prompt", text=f"@{path}"))


def file_of(tree, config=LLAMA, source="base"):
    tensors = jax.tree.map(lambda x: lazy(np.asarray(x)), tree)
    return ModelFile(config, tensors, source, None, ModelSpec(source=source))


@pytest.mark.parametrize("kind", KINDS)
def test_it_lies_on_disk_as_peft_reads_it(tmp_path, kind):
    """PEFT views its rows as [tokens, 2·layers, heads, width]: key and value of the first layer, then of the next."""
    own = random_soft(kind)
    out = export_soft_prompt(file_of(params_of(LLAMA) | own), tmp_path / "out")
    rows = map_safetensors(out / WEIGHTS)["prompt_embeddings"]
    if kind == "prefix":
        past = rows.reshape(5, 6, 2, 8)
        for name, first in (("k", 0), ("v", 1)):
            np.testing.assert_array_equal(past[:, first::2].swapaxes(0, 1), own[SOFT_PROMPT][name])
    else:
        np.testing.assert_array_equal(rows, own[SOFT_PROMPT]["embedding"])
    found = json.loads((out / ADAPTER).read_text())
    assert found["peft_type"] == f"{kind.upper()}_TUNING" and found["num_virtual_tokens"] == 5
    assert (found["token_dim"], found["num_attention_heads"]) == {"prompt": (32, 4), "prefix": (16, 2)}[kind]
    back = jax.tree.map(lambda x: x.all(), tensors_of(out, LLAMA))
    jax.tree.map(np.testing.assert_array_equal, back, own[SOFT_PROMPT])


@pytest.fixture(params=["llama_3", "gpt2"])
def base(request):
    return GOLDEN / request.param


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_that_peft_computed(tmp_path, base, kind):
    """The directories are PEFT's own, and so are the logits (tests/golden/make_peft.py)."""
    directory = shutil.copytree(GOLDEN / "peft" / f"{base.name}_{kind}", tmp_path / "adapter")
    named = json.loads((directory / ADAPTER).read_text()) | {"base_model_name_or_path": str(base)}
    (directory / ADAPTER).write_text(json.dumps(named))
    file, golden = open_model(str(directory)), np.load(directory / "expected.npz")
    model, params = Model(file.config), jax.tree.map(lambda x: jnp.asarray(x.all()), file.tensors)
    hidden_BTD = run(model, params, plain_view(golden["tokens"])).hidden_BTD
    got = np.asarray(hidden_BTD, np.float64) @ np.asarray(model.head(params).w_DV, np.float64)
    np.testing.assert_allclose(got, golden["logits"], atol=2e-5 * np.abs(golden["logits"]).max())
    plain = run(model, bare(params), plain_view(golden["tokens"])).hidden_BTD
    assert np.abs(hidden_BTD - plain).max() > 0.01
    again = open_model(str(export_soft_prompt(file, tmp_path / "again")))
    assert again.sha256() == file.sha256() and again.base.source == str(base)


def written(directory, peft_type="PROMPT_TUNING", base="nowhere", shape=(3, 32), name="prompt_embeddings"):
    directory.mkdir()
    (directory / ADAPTER).write_text(json.dumps({"peft_type": peft_type, "base_model_name_or_path": str(base)}))
    write_safetensors(directory / WEIGHTS, {name: lazy(np.zeros(shape, np.float32))})
    return directory


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base": "nowhere"}, "is an adapter of nowhere, which is wanted too: no model .*base_model_name_or_path"),
        ({"peft_type": "LORA"}, "an adapter of the kind LORA; wanted PROMPT_TUNING or PREFIX_TUNING"),
        ({"shape": (3, 33)}, r"\(3, 33\).*wanted prompt_embeddings of shape \(tokens, 32\)"),
        ({"shape": (0, 32)}, r"wanted prompt_embeddings"),
        ({"peft_type": "PREFIX_TUNING"}, r"wanted prompt_embeddings of shape \(tokens, 192\)"),
        ({"name": "other"}, "other.*wanted prompt_embeddings"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, values, said):
    with pytest.raises(UserError, match=said) as caught:
        open_model(str(written(tmp_path / "adapter", **{"base": GOLDEN / "llama_3", **values})))
    assert "\n" not in str(caught.value)


def test_what_no_base_can_be_named_for_is_not_exported(tmp_path):
    cut = replace(file_of(params_of(LLAMA) | random_soft("prompt")), base=ModelSpec(source="x", keep_layers=(0,)))
    with pytest.raises(UserError, match="cut to some layers.*kdjax student"):
        export_soft_prompt(cut, tmp_path / "out")
    gemma = CONFIGS["gemma"]
    with pytest.raises(UserError, match="scales its embeddings"):
        export_soft_prompt(file_of(params_of(gemma) | random_soft("prompt", gemma), gemma), tmp_path / "out")
    export_soft_prompt(file_of(params_of(gemma) | random_soft("prefix", gemma), gemma), tmp_path / "out")


def test_one_of_another_model_is_refused():
    own = random_soft("prefix", replace(LLAMA, kv_heads=4))[SOFT_PROMPT]
    with pytest.raises(UserError, match="the soft prompt of here has shapes"):
        check_fits(own, LLAMA, "here")
    with pytest.raises(UserError, match="base has a soft prompt.*name its base"):
        file_of(params_of(LLAMA) | random_soft("prompt")).check_plain()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_exported(tmp_path, base, kind):
    """By hand, with `pip install peft torch`: neither is needed for anything else."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    file = open_model(str(base))
    params = jax.tree.map(lambda x: jnp.asarray(x.all()), file.tensors) | random_soft(kind, file.config)
    out = export_soft_prompt(file_of(params, file.config, str(base)), tmp_path / "out")
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    tokens = some_tokens(2, 7)
    with torch.no_grad():
        ids = torch.from_numpy(np.asarray(tokens)).long()
        wanted = peft.PeftModel.from_pretrained(whole, str(out)).eval()(
            input_ids=ids, attention_mask=torch.ones_like(ids)
        )
    model = Model(file.config)
    got = np.asarray(run(model, params, plain_view(tokens)).hidden_BTD) @ np.asarray(model.head(params).w_DV)
    logits = wanted.logits[:, -7:].numpy()
    np.testing.assert_allclose(got, logits, atol=2e-5 * np.abs(logits).max())
