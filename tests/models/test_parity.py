"""The same logits and text as transformers: golden files always, live both ways where torch is installed."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.models import error, logits, packed_error, their_logits, theirs, view
from kdjax.generate import generate
from kdjax.models import Cut, Importance, Model, export, open_model
from kdjax.models.convert import disk_tensors
from kdjax.models.family import sizes_of
from kdjax.models.files import map_safetensors
from kdjax.models.prune import densified, pick, shape, take
from kdjax.models.registry import FAMILIES
from kdjax.shapes import View

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ["llama_tied", "llama_untied", "llama_3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"]
NAMES += ["mixtral", "qwen3_moe", "smollm3", "olmo2", "gpt_neox", "phi3"]
NAMES += [
    "bert",
    "bert_classifier",
    "bert_model",
    "t5",
    "t5_gated",
    "modernbert",
    "roberta",
    "roberta_classifier",
    "distilbert",
]
NAMES += ["distilbert_classifier", "modernbert_classifier"]


@functools.cache
def loaded(name):
    file = open_model(str(GOLDEN / name))
    return file, Model(file.config), jax.tree.map(lambda tensor: tensor.all(), file.tensors)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_text_equal_the_golden_ones(name):
    _, model, params = loaded(name)
    expected = np.load(GOLDEN / name / "expected.npz")
    assert np.abs(expected["logits"]).max() > (0.1 if model.config.labels else 1)
    assert error(logits(model, params, view(model.config, expected["tokens"])), expected["logits"]) <= 1e-5
    if "greedy" in expected:
        greedy = generate(model, params, [expected["tokens"][0].tolist()], max_new_tokens=10)
        assert greedy[0] == expected["greedy"].tolist()


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", NAMES)
def test_packed_and_padded_rows_give_the_golden_logits(name):
    _, model, params = loaded(name)
    expected = np.load(GOLDEN / name / "expected.npz")
    assert packed_error(model, params, expected) <= 1e-5


def exported(config, params, out):
    """The model as transformers loads it from our export."""
    pytest.importorskip("transformers")
    return theirs(export(config, params, out, None), config)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_is_the_same_in_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    file, model, params = loaded(name)
    moved = jax.tree.map(lambda x: x + np.float32(0.01) * np.sin(np.arange(x.size)).reshape(x.shape), params)
    other = exported(file.config, moved, tmp_path / "out")
    assert other.dtype == torch.float32
    tokens = np.load(GOLDEN / name / "expected.npz")["tokens"]
    with torch.no_grad():
        wanted = their_logits(other, torch.tensor(tokens)).numpy()
    assert error(logits(model, moved, view(file.config, tokens)), wanted) <= 1e-5
    if file.config.causal:
        ends = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = other.generate(torch.tensor(tokens[:1]), max_new_tokens=8, **ends)[0, -8:]
        assert generate(model, moved, [tokens[0].tolist()], max_new_tokens=8)[0] == text.tolist()


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
    first = transformers.LlamaForCausalLM(hf).eval()
    first.save_pretrained(tmp_path)
    file = open_model(str(tmp_path))
    params = jax.tree.map(lambda tensor: tensor.all(), file.tensors)
    tokens = np.random.default_rng(0).integers(1, 128, (2, 24))
    with torch.no_grad():
        wanted = first(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(Model(file.config), params, view(file.config, tokens)), wanted, atol=2e-5, rtol=0)
    again = exported(file.config, params, tmp_path / "out")
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(tokens)).logits.numpy(), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padded_batches_equal_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    file, model, params = loaded(name)
    other = exported(file.config, params, tmp_path / "out")
    tokens = np.load(GOLDEN / name / "expected.npz")["tokens"].astype(np.int32)
    mask = np.array([[0] * 3 + [1] * 9, [1] * 12])
    mask = mask if file.config.task == "causal_lm" else mask[:, ::-1].copy()
    seen = view(file.config, tokens)
    masks = {"attention_mask": torch.tensor(mask)}
    if file.config.encoder_layers:
        seen = replace(seen, encoder=replace(seen.encoder, segment_BT=mask))
    else:
        seen = View(tokens, mask, np.maximum(np.cumsum(mask, 1) - 1, 0))
    if file.config.task == "causal_lm":
        masks |= {"position_ids": torch.tensor(seen.position_BT)}
    with torch.no_grad():
        wanted = their_logits(other, torch.tensor(tokens, dtype=torch.long), **masks).numpy()
    real = seen.segment_BT[:, : wanted.shape[1], None] > 0
    assert (
        error(np.where(real, logits(model, params, seen)[:, : wanted.shape[1]], 0), np.where(real, wanted, 0)) <= 1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_torch(name, tmp_path):
    torch = pytest.importorskip("torch")
    file, model, params = loaded(name)
    family, other = FAMILIES[file.config.family], exported(file.config, params, tmp_path / "out")
    tokens = np.load(GOLDEN / name / "expected.npz")["tokens"].astype(np.int32)
    said = their_logits(other, torch.tensor(tokens, dtype=torch.long))
    torch.tanh(said).sum().backward()
    seen, there = view(file.config, tokens), said.shape[1]
    grads = jax.jit(jax.grad(lambda p: jax.numpy.tanh(logits(model, p, seen)[:, :there]).sum()))(params)
    for parameter in other.parameters():  # saved in their place, which gives them the names that weights have on disk
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    other.save_pretrained(tmp_path / "gradients")
    sizes, weights = sizes_of(file.config), family.weights_of(file.config).values()
    less = {disk_name: weight.less for weight in weights for disk_name in weight.names(sizes).values()}
    ours = disk_tensors(family, file.config, grads)
    named = map_safetensors(tmp_path / "gradients" / "model.safetensors")
    named = {family.prefix + name if family.prefix + name in ours else name: grad for name, grad in named.items()}
    others = named.keys() - ours.keys()
    assert ours.keys() <= named.keys() and all(
        re.fullmatch(family.ignored, n.removeprefix(family.prefix)) for n in others
    )
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
        ("bert", Cut(layers=2, choose="importance", mlp=20, heads=2, width=16)),
        ("bert_classifier", Cut(keep_layers=(0, 2), mlp=20, heads=3, width=24)),
        ("roberta", Cut(layers=2, mlp=20, vocab=100)),
        ("distilbert", Cut(layers=1, heads=2, width=16)),
        ("modernbert", Cut(layers=2, choose="importance", mlp=20, heads=2, width=16)),
        ("modernbert_classifier", Cut(layers=1, mlp=20)),
        ("t5", Cut(layers=1, encoder_layers=2, choose="importance", mlp=20, heads=2, width=20)),
        ("t5_gated", Cut(layers=2, mlp=20, heads=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cut_model_is_the_same_in_transformers(name, cut, tmp_path):
    torch = pytest.importorskip("torch")
    file, rng = open_model(str(GOLDEN / name)), np.random.default_rng(0)
    dense = densified(file, (1, 3, 0)) if cut.dense else file
    sizes = sizes_of(file.config)
    letters = ("L", "LH", "LF", "D", "LE", *(("M", "MH", "MF") if sizes["M"] else ()))
    scores = Importance(*(rng.random([sizes[letter] for letter in of]) for of in letters))
    picks = pick(dense.config, cut, scores)
    student = take(dense, {**picks, "V": np.arange(100)} if cut.vocab else picks)
    assert student.config == shape(file, cut)
    params = jax.tree.map(lambda tensor: tensor.all(), student.tensors)
    other = exported(student.config, student.tensors, tmp_path / "out")
    tokens = np.load(GOLDEN / name / "expected.npz")["tokens"] % student.config.vocab_size
    with torch.no_grad():
        wanted = their_logits(other, torch.tensor(tokens)).numpy()
    assert error(logits(Model(student.config), params, view(student.config, tokens)), wanted) <= 1e-5
