"""A config.json is read exactly, in both styles of transformers, or refused; never read wrongly."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from kdjax.errors import UserError
from kdjax.models import Model, ModelConfig
from kdjax.models.config import Rope
from kdjax.models.family import sizes_of
from kdjax.models.paths import parameter_paths
from kdjax.models.registry import FAMILIES, family_named

GOLDEN = Path(__file__).parent.parent / "golden"
LLAMA_HF = json.loads((GOLDEN / "llama_untied" / "config.json").read_text())
GPT2_HF = json.loads((GOLDEN / "gpt2" / "config.json").read_text())
LLAMA = FAMILIES["llama"].config_from_hf(LLAMA_HF)
GPT2 = FAMILIES["gpt2"].config_from_hf(GPT2_HF)


NEW = ("mixtral", "qwen3_moe", "smollm3", "olmo2", "gpt_neox", "phi3", "bert", "bert_classifier", "bert_model")
NEW += ("roberta", "roberta_classifier", "distilbert", "distilbert_classifier", "t5", "t5_gated", "modernbert")
NEW += ("modernbert_classifier",)
QWEN2_HF = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
QWEN3_HF = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
QWEN2 = FAMILIES["qwen2"].config_from_hf(QWEN2_HF)
QWEN3 = FAMILIES["qwen3"].config_from_hf(QWEN3_HF)
GEMMA2_HF = json.loads((GOLDEN / "gemma2" / "config.json").read_text())
GEMMA3_HF = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
MISTRAL_HF = json.loads((GOLDEN / "mistral" / "config.json").read_text())
GEMMA2 = FAMILIES["gemma2"].config_from_hf(GEMMA2_HF)
GEMMA3 = FAMILIES["gemma3_text"].config_from_hf(GEMMA3_HF)
MISTRAL = FAMILIES["mistral"].config_from_hf(MISTRAL_HF)
HF = {name: json.loads((GOLDEN / name / "config.json").read_text()) for name in NEW}
NEWER = {name: FAMILIES[hf["model_type"]].config_from_hf(hf) for name, hf in HF.items()}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def without(hf, *keys):
    return {key: value for key, value in hf.items() if key not in keys}


def test_both_styles_of_rope_are_read():
    version_4 = without(LLAMA_HF, "rope_parameters") | {"rope_theta": 50_000, "rope_scaling": None}
    assert LLAMA.rope == Rope(50_000) and FAMILIES["llama"].config_from_hf(version_4) == LLAMA
    neither = FAMILIES["llama"].config_from_hf(without(LLAMA_HF, "rope_parameters"))
    assert neither.rope == Rope()


def test_scaled_rope_is_read_in_both_styles():
    read = FAMILIES["llama"].config_from_hf
    stretched = LLAMA3_ROPE | {"original_max_position_embeddings": 16}
    five = read(LLAMA_HF | {"rope_parameters": stretched | {"rope_theta": 5e5}})
    four = read(without(LLAMA_HF, "rope_parameters") | {"rope_theta": 5e5, "rope_scaling": stretched})
    assert five == four and five.rope == Rope(5e5, "llama3", 8.0, 16)
    assert read(LLAMA_HF | {"rope_scaling": {"type": "linear", "factor": 2}}).rope == Rope(5e4, "linear", 2.0)
    assert read(LLAMA_HF | {"rope_scaling": {"type": "dynamic", "factor": 2}}).rope == Rope(5e4, "dynamic", 2.0, 64)
    yarn = read(LLAMA_HF | {"rope_scaling": {"type": "yarn", "factor": 4.0}}).rope
    assert (yarn.made_for, yarn.beta_slow, yarn.beta_fast) == (64, 1.0, 32.0)
    assert yarn.attention_factor == pytest.approx(1 + 0.1 * math.log(4))


def test_what_is_absent_in_a_qwen_is_not_what_it_is_in_a_llama():
    bare = without(QWEN2_HF, "max_position_embeddings", "use_sliding_window", "layer_types")
    config = FAMILIES["qwen2"].config_from_hf(bare | {"sliding_window": 4096})
    assert config.max_positions == 32_768 and config.qkv_bias and not config.out_bias and config.qk_norm == "none"
    assert FAMILIES["qwen3"].config_from_hf(without(QWEN3_HF, "head_dim")).head_width == 128
    biased = FAMILIES["qwen3"].config_from_hf(QWEN3_HF | {"attention_bias": True})
    assert biased.qkv_bias and biased.out_bias and biased.qk_norm == "head" and not QWEN3.qkv_bias


def test_what_newer_families_say():
    moe, mixtral, smol = NEWER["qwen3_moe"], NEWER["mixtral"], NEWER["smollm3"]
    assert (moe.experts, moe.experts_per_token, moe.mlp_width, moe.normalise_picks) == (5, 2, 24, False)
    assert (mixtral.experts, mixtral.normalise_picks, mixtral.windows) == (4, True, ())
    assert smol.unrotated == (1,) and smol.rope.theta == 2e6 and smol.tie_head
    every_fourth = FAMILIES["smollm3"].config_from_hf(
        without(HF["smollm3"], "no_rope_layers", "no_rope_layer_interval", "layer_types") | {"num_hidden_layers": 9}
    )
    assert every_fourth.unrotated == (3, 7)
    assert NEWER["olmo2"].norms == "after" and NEWER["olmo2"].qk_norm == "heads"
    assert NEWER["phi3"].windows == (7, 7, 7) and NEWER["phi3"].rope == Rope(1e3, share=0.5)
    neox = NEWER["gpt_neox"]
    assert neox.parallel and neox.rope == Rope(1e3, share=0.5) and not neox.tie_head
    version_4 = without(HF["gpt_neox"], "rope_parameters") | {"rotary_pct": 0.25, "rotary_emb_base": 500}
    assert FAMILIES["gpt_neox"].config_from_hf(version_4).rope == Rope(500.0, share=0.25)


def test_what_encoders_and_encoder_decoders_say():
    tasks = {name: NEWER[name].task for name in NEW[6:]}
    assert tasks == {
        **dict.fromkeys(("bert", "roberta", "distilbert", "modernbert"), "masked_lm"),
        **{name: "classification" for name in NEW if name.endswith("classifier")},
        **{"bert_model": "embedding", "t5": "seq2seq", "t5_gated": "seq2seq"},
    }
    assert NEWER["bert_classifier"].labels == 3 and NEWER["roberta_classifier"].labels == 2
    assert (NEWER["roberta"].max_positions, NEWER["roberta"].first_position) == (63, 1)
    t5, gated = NEWER["t5"], NEWER["t5_gated"]
    assert t5.tie_head and t5.head_scale == 32**-0.5 and not t5.gated_mlp and t5.activation == "relu"
    assert gated.head_scale is None and gated.gated_mlp and gated.activation == "gelu_tanh"
    modern = NEWER["modernbert"]
    assert modern.windows == (0, 4, 4) and modern.unnormed == (0,) and not modern.norm_bias
    assert (modern.rope, modern.local_rope) == (Rope(160_000.0), Rope(10_000.0))
    five = without(HF["modernbert"], "layer_types", "rope_parameters") | {"global_rope_theta": 5e4}
    assert FAMILIES["modernbert"].config_from_hf(five).rope == Rope(5e4)
    four = without(HF["t5_gated"], "scale_decoder_outputs", "num_decoder_layers") | {"tie_word_embeddings": False}
    assert FAMILIES["t5"].config_from_hf(four) == replace(gated, tie_head=False)


def test_windows_are_read_by_layer():
    assert GEMMA2.windows == (5, 0, 5) and GEMMA3.windows == (5, 5, 0) and MISTRAL.windows == (5, 5, 5)
    assert (GEMMA3.rope, GEMMA3.local_rope) == (Rope(1e3, "linear", 4.0), Rope(1e2))
    absent = FAMILIES["gemma3_text"].config_from_hf(without(GEMMA3_HF, "layer_types") | {"num_hidden_layers": 7})
    assert absent.windows == (5, 5, 5, 5, 5, 0, 5)
    four = without(GEMMA3_HF, "rope_parameters") | {"rope_theta": 1e3, "rope_local_base_freq": 100}
    four |= {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert FAMILIES["gemma3_text"].config_from_hf(four) == GEMMA3
    assert FAMILIES["mistral"].config_from_hf(MISTRAL_HF | {"sliding_window": None}).windows == ()
    assert FAMILIES["gemma2"].config_from_hf(GEMMA2_HF | {"attn_logit_softcapping": None}).attention_soft_cap is None


def test_absent_keys_mean_what_transformers_means():
    hf = without(LLAMA_HF, "head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias", "hidden_act")
    config = FAMILIES["llama"].config_from_hf(hf)
    assert (config.head_width, config.kv_heads) == (8, 4)
    assert not config.tie_head and not config.qkv_bias and config.activation == "silu"
    smallest = FAMILIES["gpt2"].config_from_hf({"model_type": "gpt2"})
    assert (smallest.width, smallest.layers, smallest.mlp_width, smallest.max_positions) == (768, 12, 3072, 1024)
    assert smallest.tie_head and smallest.activation == "gelu_tanh"


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        replace(LLAMA, tie_head=True, mlp_bias=False),
        *(replace(LLAMA, rope=Rope(9.0, scaling, 3.0)) for scaling in ("linear", "yarn", "llama3")),
        replace(LLAMA, rope=Rope(9.0, "dynamic", 3.0, LLAMA.max_positions)),
        QWEN2,
        QWEN3,
        GEMMA2,
        GEMMA3,
        MISTRAL,
        replace(MISTRAL, windows=()),
        GPT2,
        *(NEWER[name] for name in NEW[6:]),
    ],
    ids=str,
)
def test_what_is_written_reads_back(config):
    family = FAMILIES[config.family]
    assert family.config_from_hf(json.loads(json.dumps(family.config_to_hf(config)))) == config


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (LLAMA_HF | {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling has rope_type 'longrope'"),
        (LLAMA_HF | {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        (LLAMA_HF | {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (LLAMA_HF | {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_frequency 4.0 is not below"),
        (
            LLAMA_HF | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
            "wanted an even number from 4",
        ),
        (LLAMA_HF | {"rope_parameters": {"rope_theta": 1.0}}, "rope.theta is 1.0; wanted more than 1"),
        (GEMMA2_HF | {"layer_types": ["full_attention", "chunked", "full_attention"]}, "layer_types has 'chunked'"),
        (GEMMA2_HF | {"layer_types": ["full_attention"]}, "layer_types names 1 layers; wanted 3"),
        (GEMMA3_HF | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA2_HF | {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0; wanted a positive number"),
        (QWEN2_HF | {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16 is in force"),
        (LLAMA_HF | {"rope_parameters": 3}, "rope_parameters is 3; wanted an object"),
        (LLAMA_HF | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*wanted null"),
        (LLAMA_HF | {"sliding_window": 16}, "sliding_window 16 is in force"),
        (LLAMA_HF | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        (LLAMA_HF | {"hidden_act": "mish"}, "hidden_act is 'mish'; wanted one of silu"),
        (LLAMA_HF | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (without(LLAMA_HF, "hidden_size"), "hidden_size is missing"),
        (LLAMA_HF | {"hidden_size": "32"}, "hidden_size is '32'; wanted a value of type int"),
        (LLAMA_HF | {"num_hidden_layers": -1}, "num_hidden_layers is -1; wanted a positive number"),
        (LLAMA_HF | {"num_hidden_layers": True}, "num_hidden_layers is True; wanted a value of type int"),
        (LLAMA_HF | {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        (LLAMA_HF | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (LLAMA_HF | {"head_dim": None, "num_attention_heads": 5}, "hidden_size 32 does not divide by"),
        (LLAMA_HF | {"num_key_value_heads": 3}, "heads 4 does not divide by kv_heads 3"),
        (LLAMA_HF | {"head_dim": 7}, "head_width is 7, of which 7 are rotated; wanted an even number from 2"),
        (GPT2_HF | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (GPT2_HF | {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT2_HF | {"scale_attn_weights": False}, "scale_attn_weights is False"),
        (GPT2_HF | {"activation_function": "mish"}, "activation_function is 'mish'"),
        (HF["qwen3_moe"] | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (HF["qwen3_moe"] | {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        (HF["qwen3_moe"] | {"num_experts_per_tok": 6}, "experts is 5 and experts_per_token 6"),
        (HF["smollm3"] | {"no_rope_layers": [1]}, "no_rope_layers names 1 layers; wanted 3"),
        (HF["phi3"] | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling is 'yarn'"),
        (HF["gpt_neox"] | {"num_attention_heads": 5}, "hidden_size 32 does not divide by"),
        (HF["bert"] | {"num_attention_heads": 5}, "hidden_size 32 does not divide by"),
        (HF["bert"] | {"is_decoder": True}, "is_decoder is True, which kdjax does not compute"),
        (HF["bert"] | {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        (HF["bert"] | {"architectures": ["BertForQuestionAnswering"]}, "a head that kdjax does not compute"),
        (HF["bert_classifier"] | {"id2label": {}}, "id2label is empty"),
        (HF["roberta"] | {"pad_token_id": 99}, "max_position_embeddings is 64, none of which is left; wanted 101"),
        (HF["roberta"] | {"pad_token_id": -1}, "pad_token_id is -1; wanted a number from 0"),
        (HF["modernbert_classifier"] | {"classifier_pooling": "mean"}, "classifier_pooling is 'mean'"),
        (HF["modernbert"] | {"num_attention_heads": 5}, "hidden_size 32 does not divide by"),
        (HF["t5"] | {"feed_forward_proj": "gated-mish"}, "feed_forward_proj is 'gated-mish'"),
        (HF["t5"] | {"architectures": ["T5EncoderModel"]}, "architectures is 'T5EncoderModel'"),
        (HF["t5"] | {"relative_attention_num_buckets": 4}, "relative_buckets is 4"),
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
    [
        ("lama", "did you mean 'llama'"),
        ("bort", "did you mean 'bert'"),
        ("whisper", "known: bert, distilbert, gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral"),
        (None, "model_type is None"),
    ],
)
def test_an_unknown_family_is_refused_by_name(name, message):
    with pytest.raises(UserError, match=message):
        family_named(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_the_table_fits_its_parameter(name):
    """The table's letters give the parameter's shape, and every parameter the family can have is in it."""
    config = {
        "llama": replace(LLAMA, max_positions=40),
        "qwen2": replace(QWEN2, max_positions=40, tie_head=False),
        "qwen3": replace(QWEN3, max_positions=40, qkv_bias=True, out_bias=True),
        "mistral": replace(MISTRAL, max_positions=40, tie_head=False),
        "gemma2": replace(GEMMA2, max_positions=40, tie_head=False, qkv_bias=True, out_bias=True),
        "gemma3_text": replace(GEMMA3, max_positions=40, tie_head=False, qkv_bias=True, out_bias=True),
        "gpt2": replace(GPT2, max_positions=40, tie_head=False),
        "mixtral": replace(NEWER["mixtral"], tie_head=False),
        "qwen3_moe": replace(NEWER["qwen3_moe"], tie_head=False, qkv_bias=True, out_bias=True),
        "smollm3": replace(NEWER["smollm3"], tie_head=False, qkv_bias=True, out_bias=True, mlp_bias=True),
        "olmo2": replace(NEWER["olmo2"], tie_head=False, qkv_bias=True, out_bias=True),
        "gpt_neox": replace(NEWER["gpt_neox"], tie_head=False),
        "phi3": replace(NEWER["phi3"], tie_head=False),
        "bert": replace(NEWER["bert"], tie_head=False),
        "roberta": replace(NEWER["roberta"], tie_head=False, max_positions=41),
        "distilbert": replace(NEWER["distilbert"], tie_head=False),
        "t5": replace(NEWER["t5_gated"], tie_head=False),
        "modernbert": replace(
            NEWER["modernbert"], tie_head=False, norm_bias=True, mlp_bias=True, qkv_bias=True, out_bias=True
        ),
    }[name]
    others = {  # what cannot be in one model with that
        "bert": NEWER["bert_classifier"],
        "roberta": NEWER["roberta_classifier"],
        "distilbert": NEWER["distilbert_classifier"],
        "t5": NEWER["t5"],
        "modernbert": NEWER["modernbert_classifier"],
    }
    found, family = set(), FAMILIES[name]
    for each in filter(None, (config, others.get(name))):
        shapes = parameter_paths(jax.eval_shape(Model(each).init, jax.random.key(0)))
        sizes, weights = sizes_of(each), family.weights_of(each)
        for path, shape in shapes.items():
            ours = tuple(sizes[letter] for letter in weights[path].ours)
            index = next(reversed(weights[path].names(sizes)))
            assert shape.shape == (*(last + 1 for last in index), *ours)
        found |= shapes.keys()
    assert found == family.weights.keys() >= family.plain.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "heads 4 does not divide by kv_heads 3"),
        ({"layers": 0}, "layers is 0; wanted at least 1"),
        ({"layers": 10_001}, "layers is 10001; wanted at most 10,000"),
        ({"head_width": 15}, "head_width is 15"),
        ({"rope": Rope(share=0.2)}, "head_width is 16, of which 3 are rotated"),
        ({"unrotated": (2,)}, r"unrotated is \(2,\); wanted layers from 0 to 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"windows": (4,)}, r"windows is \(4,\); wanted 2, one for each layer"),
        ({"windows": (4, -1)}, "each from 0"),
        ({"attention_soft_cap": 0.0}, "attention_soft_cap is 0.0; wanted more than 0, or None"),
        ({"attention_soft_cap": 5.0, "positions": "alibi"}, "attention_soft_cap cannot go with positions 'alibi'"),
        ({"labels": 2}, "labels is 2 and tie_head is True"),
        ({"labels": -1}, "labels is -1; wanted at least 0"),
        ({"encoder_layers": 2, "causal": False}, "the decoder of an encoder-decoder is causal"),
        ({"positions": "relative", "relative_buckets": 300}, "wanted at least 8 buckets"),
    ],
)
def test_an_impossible_architecture_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**change)
