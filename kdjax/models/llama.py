"""Llama (Touvron et al. 2023, arXiv:2302.13971) as Hugging Face stores it; SmolLM2 is one too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig
from kdjax.models.family import Family, Weight, hf_activation, hf_common, read, read_activation, refuse_others
from kdjax.models.hf_rope import read_rope, write_rope

_ATTENTION = "model.layers.{}.self_attn."
_MLP = "model.layers.{}.mlp."

WEIGHTS = {
    "embed/embedding": Weight("model.embed_tokens.weight", "V,D", "VD"),
    "layers/attention_norm/scale": Weight("model.layers.{}.input_layernorm.weight", "D", "D"),
    "layers/attention/q/kernel": Weight(_ATTENTION + "q_proj.weight", "HK,D", "DHK"),
    "layers/attention/k/kernel": Weight(_ATTENTION + "k_proj.weight", "GK,D", "DGK"),
    "layers/attention/v/kernel": Weight(_ATTENTION + "v_proj.weight", "GK,D", "DGK"),
    "layers/attention/out/kernel": Weight(_ATTENTION + "o_proj.weight", "D,HK", "HKD"),
    "layers/attention/q/bias": Weight(_ATTENTION + "q_proj.bias", "HK", "HK"),
    "layers/attention/k/bias": Weight(_ATTENTION + "k_proj.bias", "GK", "GK"),
    "layers/attention/v/bias": Weight(_ATTENTION + "v_proj.bias", "GK", "GK"),
    "layers/attention/out/bias": Weight(_ATTENTION + "o_proj.bias", "D", "D"),
    "layers/mlp_norm/scale": Weight("model.layers.{}.post_attention_layernorm.weight", "D", "D"),
    "layers/mlp/gate/kernel": Weight(_MLP + "gate_proj.weight", "F,D", "DF"),
    "layers/mlp/up/kernel": Weight(_MLP + "up_proj.weight", "F,D", "DF"),
    "layers/mlp/down/kernel": Weight(_MLP + "down_proj.weight", "D,F", "FD"),
    "layers/mlp/gate/bias": Weight(_MLP + "gate_proj.bias", "F", "F"),
    "layers/mlp/up/bias": Weight(_MLP + "up_proj.bias", "F", "F"),
    "layers/mlp/down/bias": Weight(_MLP + "down_proj.bias", "D", "D"),
    "final_norm/scale": Weight("model.norm.weight", "D", "D"),
    "head/kernel": Weight("lm_head.weight", "V,D", "DV"),
}

COMPUTED = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
}


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type llama describes."""
    refuse_others(hf, COMPUTED)
    width, heads = read(hf, "hidden_size", int), read(hf, "num_attention_heads", int)
    if hf.get("head_dim") is None and width % heads:
        raise UserError(f"hidden_size {width} does not divide by num_attention_heads {heads}; set head_dim")
    max_positions = read(hf, "max_position_embeddings", int, 2048)
    _refuse_sliding_window(hf, max_positions)
    attention_bias = read(hf, "attention_bias", bool, False)
    return ModelConfig(
        family="llama",
        vocab_size=read(hf, "vocab_size", int),
        width=width,
        layers=read(hf, "num_hidden_layers", int),
        heads=heads,
        kv_heads=read(hf, "num_key_value_heads", int, heads),
        head_width=read(hf, "head_dim", int, width // heads),
        mlp_width=read(hf, "intermediate_size", int),
        max_positions=max_positions,
        norm="rms",
        norm_eps=read(hf, "rms_norm_eps", float, 1e-6),
        activation=read_activation(hf, "hidden_act", "silu"),
        gated_mlp=True,
        positions="rope",
        rope=read_rope(hf, max_positions),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=read(hf, "mlp_bias", bool, False),
        tie_head=read(hf, "tie_word_embeddings", bool, False),
    )


def config_to_hf(
    config: ModelConfig, model_type: str = "llama", architecture: str = "LlamaForCausalLM", without: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the config.json of such an architecture, or of one that is a Llama's but for some keys.

    Transformers 4 and 5 both read it.
    """
    own = {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": hf_activation(config.activation),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
    own = {key: value for key, value in own.items() if key not in without}
    return hf_common(config, model_type, architecture) | own | write_rope(config.rope)


def _refuse_sliding_window(hf: dict[str, Any], max_positions: int) -> None:
    window = read(hf, "sliding_window", int, max_positions)
    in_force = window < max_positions and read(hf, "use_sliding_window", bool, True)
    layer_types = read(hf, "layer_types", list, ["full_attention"])
    if in_force or any(kind != "full_attention" for kind in layer_types):
        raise UserError(f"sliding_window {window} is in force, which kdjax does not compute; wanted full attention")


LLAMA = Family(
    config_from_hf, config_to_hf, WEIGHTS, prefix="model.", ignored=r".*\.rotary_emb\.inv_freq|lm_head\.weight"
)
