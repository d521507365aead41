"""A config.json is read exactly, in both styles of transformers, or refused; never read wrongly."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from kdjax.errors import UserError
from kdjax.models import Model, ModelConfig
from kdjax.models.family import sizes_of
from kdjax.models.registry import FAMILIES, family_named
from kdjax.models.transformer import parameter_paths

GOLDEN = Path(__file__).parent.parent / "golden"
LLAMA_HF = json.loads((GOLDEN / "llama_untied" / "config.json").read_text())
GPT2_HF = json.loads((GOLDEN / "gpt2" / "config.json").read_text())
LLAMA = FAMILIES["llama"].config_from_hf(LLAMA_HF)
GPT2 = FAMILIES["gpt2"].config_from_hf(GPT2_HF)


def without(hf, *keys):
    return {key: value for key, value in hf.items() if key not in keys}


def test_both_styles_of_rope_are_read():
    version_4 = without(LLAMA_HF, "rope_parameters") | {"rope_theta": 50_000, "rope_scaling": None}
    assert LLAMA.rope_theta == 50_000 and FAMILIES["llama"].config_from_hf(version_4) == LLAMA
    neither = FAMILIES["llama"].config_from_hf(without(LLAMA_HF, "rope_parameters"))
    assert neither.rope_theta == 10_000


def test_absent_keys_mean_what_transformers_means():
    hf = without(LLAMA_HF, "head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias", "hidden_act")
    config = FAMILIES["llama"].config_from_hf(hf)
    assert (config.head_width, config.kv_heads) == (8, 4)
    assert not config.tie_head and not config.qkv_bias and config.activation == "silu"
    smallest = FAMILIES["gpt2"].config_from_hf({"model_type": "gpt2"})
    assert (smallest.width, smallest.layers, smallest.mlp_width, smallest.max_positions) == (768, 12, 3072, 1024)
    assert smallest.tie_head and smallest.activation == "gelu_tanh"


@pytest.mark.parametrize("config", [LLAMA, replace(LLAMA, tie_head=True, mlp_bias=False), GPT2], ids=str)
def test_what_is_written_reads_back(config):
    family = FAMILIES[config.family]
    assert family.config_from_hf(json.loads(json.dumps(family.config_to_hf(config)))) == config


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (LLAMA_HF | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear'"),
        (LLAMA_HF | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'"),
        (LLAMA_HF | {"rope_parameters": 3}, "rope_parameters is 3; wanted an object"),
        (LLAMA_HF | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*wanted null"),
        (LLAMA_HF | {"sliding_window": 16}, "sliding_window 16 is in force"),
        (LLAMA_HF | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        (LLAMA_HF | {"hidden_act": "relu"}, "hidden_act is 'relu'; wanted one of silu"),
        (LLAMA_HF | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (without(LLAMA_HF, "hidden_size"), "hidden_size is missing"),
        (LLAMA_HF | {"hidden_size": "32"}, "hidden_size is '32'; wanted a value of type int"),
        (LLAMA_HF | {"num_hidden_layers": -1}, "num_hidden_layers is -1; wanted a positive number"),
        (LLAMA_HF | {"num_hidden_layers": True}, "num_hidden_layers is True; wanted a value of type int"),
        (LLAMA_HF | {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        (LLAMA_HF | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (LLAMA_HF | {"head_dim": None, "num_attention_heads": 5}, "hidden_size 32 does not divide by"),
        (LLAMA_HF | {"num_key_value_heads": 3}, "heads 4 does not divide by kv_heads 3"),
        (LLAMA_HF | {"head_dim": 7}, "head_width is 7; rotary positions want an even one"),
        (GPT2_HF | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (GPT2_HF | {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT2_HF | {"scale_attn_weights": False}, "scale_attn_weights is False"),
        (GPT2_HF | {"activation_function": "mish"}, "activation_function is 'mish'"),
        (GPT2_HF | {"n_head": 5}, "n_embd 32 does not divide by n_head 5"),
    ],
)
def test_what_is_not_computed_here_is_refused(hf, message):
    with pytest.raises(UserError, match=message):
        family_named(hf["model_type"]).config_from_hf(hf)


def test_a_window_longer_than_the_model_is_no_window():
    hf = LLAMA_HF | {"sliding_window": 64, "layer_types": ["full_attention"] * 3}
    assert FAMILIES["llama"].config_from_hf(hf) == LLAMA
    assert FAMILIES["llama"].config_from_hf(LLAMA_HF | {"sliding_window": 9, "use_sliding_window": False}) == LLAMA


@pytest.mark.parametrize(
    ("name", "message"),
    [("lama", "did you mean 'llama'"), ("bert", "known: gpt2, llama"), (None, "model_type is None")],
)
def test_an_unknown_family_is_refused_by_name(name, message):
    with pytest.raises(UserError, match=message):
        family_named(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_the_table_fits_its_parameter(name):
    """The table's letters give the parameter's shape, and every parameter the family can have is in it."""
    config = {"llama": replace(LLAMA, max_positions=40), "gpt2": replace(GPT2, max_positions=40, tie_head=False)}[name]
    shapes = parameter_paths(jax.eval_shape(Model(config).init, jax.random.key(0)))
    assert shapes.keys() == FAMILIES[name].weights.keys()
    sizes = sizes_of(config)
    for path, shape in shapes.items():
        ours = tuple(sizes[letter] for letter in FAMILIES[name].weights[path].ours)
        assert shape.shape == ((config.layers, *ours) if path.startswith("layers/") else ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "heads 4 does not divide by kv_heads 3"),
        ({"layers": 0}, "layers is 0; wanted at least 1"),
        ({"head_width": 15}, "head_width is 15"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_an_impossible_architecture_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**change)
