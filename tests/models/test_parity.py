"""The same logits and text as transformers: golden files always, live both ways where torch is installed."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.models import logits, packed_error, view
from kdjax.generate import generate
from kdjax.models import Cut, Importance, Model, export, open_model, select_layers
from kdjax.models.convert import disk_tensors
from kdjax.models.family import sizes_of
from kdjax.models.files import map_safetensors
from kdjax.models.prune import densified, pick, shape, take
from kdjax.models.registry import FAMILIES
from kdjax.shapes import View

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ["llama_tied", "llama_untied", "llama_3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"]
NAMES += ["mixtral", "qwen3_moe", "smollm3", "olmo2", "gpt_neox", "phi3"]


@functools.cache
def loaded(name):
    file = open_model(str(GOLDEN / name))
    return file, Model(file.config), jax.tree.map(lambda tensor: tensor.all(), file.tensors)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_text_equal_the_golden_ones(name):
    _, model, params = loaded(name)
    expected = np.load(GOLDEN / name / "expected.npz")
    got = logits(model, params, view(expected["tokens"]))
    assert np.abs(expected["logits"]).max() > 1
    np.testing.assert_allclose(got, expected["logits"], atol=1e-5, rtol=0)
    greedy = generate(model, params, [expected["tokens"][0].tolist()], max_new_tokens=10)
    assert greedy[0] == expected["greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_packed_and_padded_rows_give_the_golden_logits(name):
    _, model, params = loaded(name)
    expected = np.load(GOLDEN / name / "expected.npz")
    assert packed_error(model, params, expected["tokens"], expected["logits"]) <= 1e-5


def exported(config, params, out):
    """The model as transformers loads it from our export."""
    transformers = pytest.importorskip("transformers")
    export(config, params, out, None)
    return transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_is_the_same_in_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    file, model, params = loaded(name)
    moved = jax.tree.map(lambda x: x + np.float32(0.01) * np.sin(np.arange(x.size)).reshape(x.shape), params)
    theirs = exported(file.config, moved, tmp_path / "out")
    assert theirs.dtype == torch.float32
    tokens = np.load(GOLDEN / name / "expected.npz")["tokens"]
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
        text = theirs.generate(torch.tensor(tokens[:1]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    np.testing.assert_allclose(logits(model, moved, view(tokens)), wanted, atol=1e-5, rtol=0)
    assert generate(model, moved, [tokens[0].tolist()], max_new_tokens=8)[0] == text[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": 7,
            "truncate": False,
            "beta_fast": 4.0,
        },
        {"rope_type": "yarn", "factor": 3.0, "mscale": 1.2, "mscale_all_dim": 0.7},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 8,
        },
    ],
    ids=lambda rope: "-".join(rope),
)
def test_scaled_rotary_positions_equal_transformers(rope, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 9}
    torch.manual_seed(0)
    hf = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2, rope_parameters={"rope_theta": 100.0} | rope)
    theirs = transformers.LlamaForCausalLM(hf).eval()
    theirs.save_pretrained(tmp_path)
    file = open_model(str(tmp_path))
    params = jax.tree.map(lambda tensor: tensor.all(), file.tensors)
    tokens = np.random.default_rng(0).integers(1, 128, (2, 24))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(Model(file.config), params, view(tokens)), wanted, atol=2e-5, rtol=0)
    again = exported(file.config, params, tmp_path / "out")
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(tokens)).logits.numpy(), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padded_batches_equal_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    file, model, params = loaded(name)
    theirs = exported(file.config, params, tmp_path / "out")
    tokens = np.load(GOLDEN / name / "expected.npz")["tokens"].astype(np.int32)
    mask = np.array([[0] * 3 + [1] * 9, [1] * 12])
    position = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        wanted = theirs(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=torch.tensor(position)
        ).logits.numpy()
    got = np.asarray(logits(model, params, View(tokens, mask, position)))
    np.testing.assert_allclose(got[mask > 0], wanted[mask > 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_torch(name, tmp_path):
    torch = pytest.importorskip("torch")
    file, model, params = loaded(name)
    theirs = exported(file.config, params, tmp_path / "out")
    tokens = np.load(GOLDEN / name / "expected.npz")["tokens"].astype(np.int32)
    torch.tanh(theirs(torch.tensor(tokens, dtype=torch.long)).logits).sum().backward()
    seen = view(tokens)
    grads = jax.jit(jax.grad(lambda p: jax.numpy.tanh(logits(model, p, seen)).sum()))(params)
    for parameter in theirs.parameters():  # saved in their place, which gives them the names that weights have on disk
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    named = map_safetensors(tmp_path / "gradients" / "model.safetensors")
    sizes, weights = sizes_of(file.config), FAMILIES[file.config.family].weights.values()
    less = {disk_name: weight.less for weight in weights for disk_name in weight.names(sizes).values()}
    ours = disk_tensors(FAMILIES[file.config.family], file.config, grads)
    assert ours.keys() == named.keys()
    for disk_name, tensor in ours.items():
        got, wanted = tensor.all() + less[disk_name], named[disk_name]  # a gradient knows no distance from 1
        np.testing.assert_allclose(got, wanted, atol=1e-4 * max(1, np.abs(wanted).max()), err_msg=disk_name)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("llama_tied", Cut(layers=2, mlp=20, kv_heads=1, width=24, vocab=100)),
        ("qwen3", Cut(keep_layers=(0, 2), mlp=20, heads=2, width=16)),
        ("gemma3", Cut(layers=2, choose="ends", mlp=20, kv_heads=1, width=16)),
        ("gpt2", Cut(layers=2, mlp=20)),
        ("mixtral", Cut(layers=2, mlp=20, width=16, dense=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cut_model_is_the_same_in_transformers(name, cut, tmp_path):
    torch = pytest.importorskip("torch")
    file, rng = open_model(str(GOLDEN / name)), np.random.default_rng(0)
    dense = densified(file, (1, 3, 0)) if cut.dense else file
    sizes = sizes_of(file.config)
    scores = Importance(
        *(rng.random([sizes[letter] for letter in letters]) for letters in ("L", "LH", "LF", "D", "LE"))
    )
    keep, picks = pick(dense.config, cut, scores)
    picks = {**picks, "V": np.arange(100)} if cut.vocab else picks
    student = take(select_layers(dense, keep), picks)
    assert student.config == shape(file, cut)
    params = jax.tree.map(lambda tensor: tensor.all(), student.tensors)
    theirs = exported(student.config, student.tensors, tmp_path / "out")
    tokens = np.load(GOLDEN / name / "expected.npz")["tokens"] % student.config.vocab_size
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(Model(student.config), params, view(tokens)), wanted, atol=1e-5, rtol=0)
