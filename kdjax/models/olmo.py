"""OLMo 2 (OLMo team 2024, arXiv:2501.00656): Llama's layers with norms after each branch, and on queries and keys."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from kdjax.models import llama
from kdjax.models.config import ModelConfig
from kdjax.models.family import Weight, with_defaults

_LAYER = "model.layers.{}."

_OTHERS = re.compile(r"layers/(attention|mlp)_norm/.*|layers/mlp/.*/bias")

WEIGHTS = {path: weight for path, weight in llama.WEIGHTS.items() if not _OTHERS.fullmatch(path)} | {
    "layers/attention/q_norm/scale": Weight(_LAYER + "self_attn.q_norm.weight", "HK", "HK"),
    "layers/attention/k_norm/scale": Weight(_LAYER + "self_attn.k_norm.weight", "GK", "GK"),
    "layers/attention_after_norm/scale": Weight(_LAYER + "post_attention_layernorm.weight", "D", "D"),
    "layers/mlp_after_norm/scale": Weight(_LAYER + "post_feedforward_layernorm.weight", "D", "D"),
}


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type olmo2 describes."""
    config = llama.config_from_hf(with_defaults(hf, {"rms_norm_eps": 1e-5}) | {"mlp_bias": False})
    return replace(config, family="olmo2", norms="after", qk_norm="heads")


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return llama.config_to_hf(config, "olmo2", "Olmo2ForCausalLM", ("mlp_bias",))


OLMO2 = replace(llama.LLAMA, config_from_hf=config_from_hf, config_to_hf=config_to_hf, weights=WEIGHTS)
