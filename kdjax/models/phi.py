"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219) and Phi-4: Llama's layers, with matrices that read one input fused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdjax.errors import UserError
from kdjax.models import llama
from kdjax.models.config import ModelConfig
from kdjax.models.family import Weight, read, with_defaults
from kdjax.models.hf_rope import read_rope
from kdjax.models.hf_windows import read_windows

_LAYER = "model.layers.{}."

WEIGHTS = {path: weight for path, weight in llama.WEIGHTS.items() if "bias" not in path}
WEIGHTS |= {
    f"layers/attention/{name}/kernel": Weight(_LAYER + "self_attn.qkv_proj.weight", "HK+GK+GK,D", ours, part)
    for part, (name, ours) in enumerate((("q", "DHK"), ("k", "DGK"), ("v", "DGK")))
}
WEIGHTS |= {
    f"layers/mlp/{name}/kernel": Weight(_LAYER + "mlp.gate_up_proj.weight", "F+F,D", "DF", part)
    for part, name in enumerate(("gate", "up"))
}

APART = ("sliding_window", "layer_types", "partial_rotary_factor", "rope_scaling", "rope_parameters")
"""Keys that mean to a Phi-3 what a Llama does not have."""


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type phi3 describes."""
    max_positions = read(hf, "max_position_embeddings", int, 4096)
    rope = read_rope(hf, max_positions, read(hf, "partial_rotary_factor", float, 1.0))
    if rope.scaling != "none":
        raise UserError(f"rope_scaling is {rope.scaling!r}, which kdjax does not compute of a Phi-3; wanted none")
    as_llama = {"attention_bias": False, "mlp_bias": False} | dict.fromkeys(APART)
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": max_positions}
    config = llama.config_from_hf(with_defaults(hf, defaults) | as_llama)
    has_window = hf.get("sliding_window") is not None
    windows = read_windows(hf, config.layers, lambda layer: has_window, max_positions)
    return replace(config, family="phi3", rope=rope, windows=windows)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return llama.config_to_hf(config, "phi3", "Phi3ForCausalLM", ("attention_bias", "mlp_bias")) | {
        "sliding_window": max(config.windows, default=0) or None,
        "partial_rotary_factor": config.rope.share,
        "original_max_position_embeddings": config.max_positions,
    }


PHI3 = replace(llama.LLAMA, config_from_hf=config_from_hf, config_to_hf=config_to_hf, weights=WEIGHTS)
