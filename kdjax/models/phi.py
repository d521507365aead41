"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219) and Phi-4: Llama's layers, with matrices that read one input fused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdjax.errors import UserError
from kdjax.models import llama
from kdjax.models.config import ModelConfig
from kdjax.models.family import Weight, read
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


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type phi3 describes."""
    known = {key: value for key, value in hf.items() if value is not None}
    share = read(hf, "partial_rotary_factor", float, 1.0)
    scaling = known.get("rope_scaling") or known.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind != "default":
        raise UserError(f"rope_scaling is {kind!r}, which kdjax does not compute of a Phi-3; wanted one without it")
    apart = ("sliding_window", "layer_types", "partial_rotary_factor", "rope_scaling", "rope_parameters")
    without = {key: value for key, value in known.items() if key not in apart}
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    config = llama.config_from_hf(defaults | without | {"attention_bias": False, "mlp_bias": False})
    has_window = hf.get("sliding_window") is not None
    windows = read_windows(hf, config.layers, lambda layer: has_window, config.max_positions)
    rope = read_rope(known, config.max_positions, share)
    return replace(config, family="phi3", rope=rope, windows=windows)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    hf = llama.config_to_hf(config) | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    return {key: value for key, value in hf.items() if "bias" not in key} | {
        "sliding_window": max(config.windows, default=0) or None,
        "partial_rotary_factor": config.rope.share,
        "original_max_position_embeddings": config.max_positions,
    }


PHI3 = replace(llama.LLAMA, config_from_hf=config_from_hf, config_to_hf=config_to_hf, weights=WEIGHTS)
