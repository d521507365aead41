"""Mistral (Jiang et al. 2023, arXiv:2310.06825) and Mixtral (Jiang et al. 2024, arXiv:2401.04088).

Both are Llama's layers, each of which may see a window only; Mixtral's have experts for mlps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdjax.models import llama
from kdjax.models.config import ModelConfig
from kdjax.models.family import expert_weights, read, with_defaults
from kdjax.models.hf_windows import read_windows

WEIGHTS = {path: weight for path, weight in llama.WEIGHTS.items() if "bias" not in path}

MIXTRAL_WEIGHTS = {path: weight for path, weight in WEIGHTS.items() if "/mlp/" not in path} | expert_weights(
    "model.layers.{}.block_sparse_moe.", gate="w1", up="w3", down="w2"
)

DEFAULTS = {"max_position_embeddings": 131_072, "num_key_value_heads": 8}
"""What an absent key means where it is not what it means in a Llama."""


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type mistral describes."""
    as_llama = {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "layer_types": None}
    config = llama.config_from_hf(with_defaults(hf, DEFAULTS) | as_llama)
    has_window = hf.get("sliding_window", 4096) is not None
    windows = read_windows(hf, config.layers, lambda layer: has_window, 4096)
    return replace(config, family="mistral", windows=windows)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return _to_hf(config, "mistral", "MistralForCausalLM")


def _to_hf(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    hf = llama.config_to_hf(config, model_type, architecture, ("attention_bias", "mlp_bias"))
    return hf | {"sliding_window": max(config.windows, default=0) or None}


def mixtral_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type mixtral describes."""
    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 1e6}
    return replace(
        config_from_hf(with_defaults(hf, defaults) | {"sliding_window": hf.get("sliding_window")}),
        family="mixtral",
        experts=read(hf, "num_local_experts", int, 8),
        experts_per_token=read(hf, "num_experts_per_tok", int, 2),
    )


def mixtral_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return _to_hf(config, "mixtral", "MixtralForCausalLM") | {
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
    }


MISTRAL = replace(llama.LLAMA, config_from_hf=config_from_hf, config_to_hf=config_to_hf, weights=WEIGHTS)
MIXTRAL = replace(llama.LLAMA, config_from_hf=mixtral_from_hf, config_to_hf=mixtral_to_hf, weights=MIXTRAL_WEIGHTS)
