"""SmolLM3 (Hugging Face 2025): Llama's layers, some of which know no positions (Yang et al. 2025, arXiv:2501.18795)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdjax.errors import UserError
from kdjax.models import llama
from kdjax.models.config import ModelConfig
from kdjax.models.family import read, with_defaults

DEFAULTS = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "rope_theta": 2e6,
}
"""What an absent key means where it is not what it means in a Llama."""


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type smollm3 describes."""
    config = llama.config_from_hf(with_defaults(hf, DEFAULTS))
    every = read(hf, "no_rope_layer_interval", int, 4)
    default = [int((layer + 1) % every != 0) for layer in range(config.layers)]
    rotated = read(hf, "no_rope_layers", list, default)
    if len(rotated) != config.layers:
        raise UserError(
            f"no_rope_layers names {len(rotated)} layers; wanted {config.layers}, as num_hidden_layers says"
        )
    unrotated = tuple(layer for layer, is_rotated in enumerate(rotated) if not is_rotated)
    return replace(config, family="smollm3", unrotated=unrotated)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return llama.config_to_hf(config, "smollm3", "SmolLM3ForCausalLM") | {
        "no_rope_layers": [int(layer not in config.unrotated) for layer in range(config.layers)],
        "layer_types": ["full_attention"] * config.layers,
        "use_sliding_window": False,
    }


SMOLLM3 = replace(llama.LLAMA, config_from_hf=config_from_hf, config_to_hf=config_to_hf)
