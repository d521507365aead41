"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671), Qwen3 (Yang et al. 2025, arXiv:2505.09388), dense.

Both are Llama's layers: Qwen2 with biases on queries, keys and values; Qwen3 with norms on queries and keys instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdjax.models import llama
from kdjax.models.config import ModelConfig
from kdjax.models.family import Weight, read

_ATTENTION = "model.layers.{}.self_attn."
_BIASED = tuple(f"layers/attention/{name}/bias" for name in "qkv")

QWEN2_WEIGHTS = {path: weight for path, weight in llama.WEIGHTS.items() if path in _BIASED or "bias" not in path}

QWEN3_WEIGHTS = {path: weight for path, weight in llama.WEIGHTS.items() if "mlp" not in path or "bias" not in path} | {
    "layers/attention/q_norm/scale": Weight(_ATTENTION + "q_norm.weight", "K", "K"),
    "layers/attention/k_norm/scale": Weight(_ATTENTION + "k_norm.weight", "K", "K"),
}

DEFAULTS = {"max_position_embeddings": 32_768, "use_sliding_window": False}
"""What an absent key means where it is not what it means in a Llama."""


def qwen2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type qwen2 describes."""
    return replace(llama.config_from_hf(_as_llama(hf)), family="qwen2", qkv_bias=True)


def qwen3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type qwen3 describes."""
    bias = {"attention_bias": read(hf, "attention_bias", bool, False), "head_dim": read(hf, "head_dim", int, 128)}
    return replace(llama.config_from_hf(_as_llama(hf) | bias), family="qwen3", qk_norm=True)


def _as_llama(hf: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with what an absent key means to Qwen, and no key that means something to Llama alone."""
    known = {key: value for key, value in hf.items() if value is not None}
    return DEFAULTS | known | {"attention_bias": False, "mlp_bias": False}


def qwen2_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return _to_hf(config, "Qwen2", "attention_bias", "mlp_bias")


def qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return _to_hf(config, "Qwen3", "mlp_bias")


def _to_hf(config: ModelConfig, name: str, *without: str) -> dict[str, Any]:
    hf = llama.config_to_hf(config) | {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"]}
    return {key: value for key, value in hf.items() if key not in without}


QWEN2 = replace(llama.LLAMA, config_from_hf=qwen2_from_hf, config_to_hf=qwen2_to_hf, weights=QWEN2_WEIGHTS)
QWEN3 = replace(llama.LLAMA, config_from_hf=qwen3_from_hf, config_to_hf=qwen3_to_hf, weights=QWEN3_WEIGHTS)
