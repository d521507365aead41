"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671), Qwen3 (Yang et al. 2025, arXiv:2505.09388) and its MoE.

All are Llama's layers: Qwen2 with biases on queries, keys and values; Qwen3 with norms on queries and keys instead;
Qwen3-MoE with experts for mlps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdjax.models import llama
from kdjax.models.config import ModelConfig
from kdjax.models.family import Weight, expert_weights, read, refuse_others, with_defaults

_ATTENTION = "model.layers.{}.self_attn."
_BIASED = tuple(f"layers/attention/{name}/bias" for name in "qkv")

QWEN2_WEIGHTS = {path: weight for path, weight in llama.WEIGHTS.items() if path in _BIASED or "bias" not in path}

QWEN3_WEIGHTS = {path: weight for path, weight in llama.WEIGHTS.items() if "mlp" not in path or "bias" not in path} | {
    "layers/attention/q_norm/scale": Weight(_ATTENTION + "q_norm.weight", "K", "K"),
    "layers/attention/k_norm/scale": Weight(_ATTENTION + "k_norm.weight", "K", "K"),
}

MOE_WEIGHTS = {path: weight for path, weight in QWEN3_WEIGHTS.items() if "/mlp/" not in path} | expert_weights(
    "model.layers.{}.mlp.", gate="gate_proj", up="up_proj", down="down_proj"
)

DEFAULTS = {"max_position_embeddings": 32_768, "use_sliding_window": False}
"""What an absent key means where it is not what it means in a Llama."""


def qwen2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type qwen2 describes."""
    return replace(llama.config_from_hf(_as_llama(hf)), family="qwen2", qkv_bias=True)


def qwen3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type qwen3 describes."""
    bias = {"attention_bias": read(hf, "attention_bias", bool, False), "head_dim": read(hf, "head_dim", int, 128)}
    return replace(llama.config_from_hf(_as_llama(hf) | bias), family="qwen3", qk_norm="head")


def moe_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type qwen3_moe describes; all its layers have experts."""
    refuse_others(hf, {"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, [])})
    width, heads = read(hf, "hidden_size", int), read(hf, "num_attention_heads", int)
    dense = hf | {
        "intermediate_size": read(hf, "moe_intermediate_size", int, 768),
        "num_key_value_heads": read(hf, "num_key_value_heads", int, 4),
        "head_dim": read(hf, "head_dim", int, max(1, width // heads)),
    }
    return replace(
        qwen3_from_hf(dense),
        family="qwen3_moe",
        experts=read(hf, "num_experts", int, read(hf, "num_local_experts", int, 128)),
        experts_per_token=read(hf, "num_experts_per_tok", int, 8),
        normalise_picks=read(hf, "norm_topk_prob", bool, False),
    )


def _as_llama(hf: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with what an absent key means to Qwen, and no key that means something to Llama alone."""
    return with_defaults(hf, DEFAULTS) | {"attention_bias": False, "mlp_bias": False}


def qwen2_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return llama.config_to_hf(config, "qwen2", "Qwen2ForCausalLM", ("attention_bias", "mlp_bias"))


def qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return llama.config_to_hf(config, "qwen3", "Qwen3ForCausalLM", ("mlp_bias",))


def moe_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return llama.config_to_hf(config, "qwen3_moe", "Qwen3MoeForCausalLM", ("mlp_bias",)) | {
        "moe_intermediate_size": config.mlp_width,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalise_picks,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN2 = replace(llama.LLAMA, config_from_hf=qwen2_from_hf, config_to_hf=qwen2_to_hf, weights=QWEN2_WEIGHTS)
QWEN3 = replace(llama.LLAMA, config_from_hf=qwen3_from_hf, config_to_hf=qwen3_to_hf, weights=QWEN3_WEIGHTS)
QWEN3_MOE = replace(llama.LLAMA, config_from_hf=moe_from_hf, config_to_hf=moe_to_hf, weights=MOE_WEIGHTS)
