"""Gemma 2 (2024, arXiv:2408.00118) and the text part of Gemma 3 (2025, arXiv:2503.19786).

Norms before and after each branch, stored as their distance from 1; layers with a window between others; embeddings
scaled. Gemma 2 caps its scores and logits; Gemma 3 has norms on queries and keys, and two kinds of rotary angles.
"""

from __future__ import annotations

from typing import Any

from kdjax.models import llama
from kdjax.models.config import ModelConfig, Rope
from kdjax.models.family import Family, Weight, hf_activation, hf_common, read, read_activation, refuse_others
from kdjax.models.hf_rope import read_rope, write_rope
from kdjax.models.hf_windows import read_windows, write_windows

_LAYER = "model.layers.{}."
_NORMS = {
    "layers/attention_norm/scale": "input_layernorm",
    "layers/attention_after_norm/scale": "post_attention_layernorm",
    "layers/mlp_norm/scale": "pre_feedforward_layernorm",
    "layers/mlp_after_norm/scale": "post_feedforward_layernorm",
}
GEMMA2_WEIGHTS = {path: weight for path, weight in llama.WEIGHTS.items() if "mlp" not in path or "bias" not in path}
GEMMA2_WEIGHTS |= {path: Weight(_LAYER + name + ".weight", "D", "D", less=1.0) for path, name in _NORMS.items()}
GEMMA2_WEIGHTS |= {"final_norm/scale": Weight("model.norm.weight", "D", "D", less=1.0)}
GEMMA3_WEIGHTS = GEMMA2_WEIGHTS | {
    f"layers/attention/{name}_norm/scale": Weight(_LAYER + f"self_attn.{name}_norm.weight", "K", "K", less=1.0)
    for name in "qk"
}

COMPUTED = {
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
}


def _common(hf: dict[str, Any], family: str, period: int, **others: Any) -> ModelConfig:
    """Return what both have; every layer has a window but each `period`-th."""
    refuse_others(hf, COMPUTED)
    layers, bias = read(hf, "num_hidden_layers", int, 26), read(hf, "attention_bias", bool, False)
    return ModelConfig(
        family=family,
        width=read(hf, "hidden_size", int, 2304),
        layers=layers,
        heads=read(hf, "num_attention_heads", int, 8),
        kv_heads=read(hf, "num_key_value_heads", int, 4),
        head_width=read(hf, "head_dim", int, 256),
        mlp_width=read(hf, "intermediate_size", int, 9216),
        norm="rms",
        norm_eps=read(hf, "rms_norm_eps", float, 1e-6),
        norms="both",
        activation=read_activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
        gated_mlp=True,
        positions="rope",
        windows=read_windows(hf, layers, lambda layer: (layer + 1) % period > 0, 4096),
        attention_scale=float(read(hf, "query_pre_attn_scalar", float, 256.0) ** -0.5),
        qkv_bias=bias,
        out_bias=bias,
        tie_head=read(hf, "tie_word_embeddings", bool, True),
        scale_embedding=True,
        **others,
    )


def gemma2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type gemma2 describes."""
    max_positions = read(hf, "max_position_embeddings", int, 8192)
    return _common(
        hf,
        "gemma2",
        2,
        vocab_size=read(hf, "vocab_size", int, 256_000),
        max_positions=max_positions,
        rope=read_rope(hf, max_positions),
        attention_soft_cap=_cap(hf, "attn_logit_softcapping", 50.0),
        head_soft_cap=_cap(hf, "final_logit_softcapping", 30.0),
    )


def gemma3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type gemma3_text describes."""
    max_positions = read(hf, "max_position_embeddings", int, 131_072)
    rope, local_rope = _two_ropes(hf, max_positions)
    return _common(
        hf,
        "gemma3_text",
        read(hf, "sliding_window_pattern", int, 6),
        vocab_size=read(hf, "vocab_size", int, 262_208),
        max_positions=max_positions,
        rope=rope,
        local_rope=local_rope,
        qk_norm="head",
        attention_soft_cap=_cap(hf, "attn_logit_softcapping", None),
        head_soft_cap=_cap(hf, "final_logit_softcapping", None),
    )


def _cap(hf: dict[str, Any], key: str, absent: float | None) -> float | None:
    """Return a soft cap; null is none, and so is `absent` where it is."""
    return None if hf.get(key, absent) is None else read(hf, key, float, absent)


def _two_ropes(hf: dict[str, Any], max_positions: int) -> tuple[Rope, Rope]:
    """Return the rotary positions of layers that see all, and of those that have a window."""
    whole, local = {"rope_theta": 1e6}, {"rope_theta": read(hf, "rope_local_base_freq", float, 1e4)}
    by_kind = read(hf, "rope_parameters", dict, {})
    whole |= {key: hf[key] for key in ("rope_theta", "rope_scaling") if hf.get(key) is not None}
    whole |= {"rope_parameters": by_kind.get("full_attention")}
    local |= {"rope_parameters": by_kind.get("sliding_attention")}
    return read_rope(whole, max_positions), read_rope(local, max_positions)


def _to_hf(config: ModelConfig, name: str, model_type: str) -> dict[str, Any]:
    return hf_common(config, model_type, f"{name}ForCausalLM") | {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": hf_activation(config.activation),
        "query_pre_attn_scalar": _scalar(config),
        "attention_bias": config.qkv_bias,
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.head_soft_cap,
        **write_windows(config.windows or (0,) * config.layers),
    }


def _scalar(config: ModelConfig) -> int | float:
    """Return what the scale is the inverse root of, as the whole number that it comes from."""
    scalar = (config.attention_scale or config.head_width**-0.5) ** -2
    return round(scalar) if float(round(scalar) ** -0.5) == config.attention_scale else scalar


def gemma2_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return _to_hf(config, "Gemma2", "gemma2") | write_rope(config.rope)


def gemma3_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    local = {"rope_local_base_freq": config.local_rope.theta} if config.local_rope else {}
    return _to_hf(config, "Gemma3", "gemma3_text") | write_rope(config.rope) | local


_IGNORED = r".*\.rotary_emb\.inv_freq|lm_head\.weight"
GEMMA2 = Family(gemma2_from_hf, gemma2_to_hf, GEMMA2_WEIGHTS, prefix="model.", ignored=_IGNORED)
GEMMA3 = Family(gemma3_from_hf, gemma3_to_hf, GEMMA3_WEIGHTS, prefix="model.", ignored=_IGNORED)
