"""The architectures of well-known models, as their config.json says them: what can be planned without their weights."""

from __future__ import annotations

from typing import Any

from kdjax.models.config import ModelConfig
from kdjax.models.fetch import hub_config
from kdjax.models.registry import family_named

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def _sizes(width: int, layers: int, heads: int, mlp: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    return sizes | more


CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA3
    | _sizes(4096, 32, 32, 14_336, rope_scaling=_LLAMA3_ROPE | {"factor": 8.0}, tie_word_embeddings=False),
    "meta-llama/Llama-3.2-1B": _LLAMA3
    | _sizes(2048, 16, 32, 8192, rope_scaling=_LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True, head_dim=64),
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(4096, 36, 32, 12_288, tie_word_embeddings=False),
    "Qwen/Qwen3-0.6B": _QWEN3 | _sizes(1024, 28, 16, 3072, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-1.7B": _SMOLLM2 | _sizes(2048, 24, 32, 8192, num_key_value_heads=32, rope_theta=130_000.0),
    "HuggingFaceTB/SmolLM2-360M": _SMOLLM2 | _sizes(960, 32, 15, 2560, num_key_value_heads=5, rope_theta=100_000.0),
    "smollm2-135m-instruct": _SMOLLM2 | _sizes(576, 30, 9, 1536, num_key_value_heads=3, rope_theta=100_000.0),
    "all-minilm-l6-v2": {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30_522}
    | _sizes(384, 6, 12, 1536),
}
"""What a model is called (a known name, a hub id) -> what of its config.json decides shapes. One more is one row."""


def known_architecture(source: str) -> ModelConfig | None:
    """Return the architecture of a model that is known without its weights, or None where its files are to be opened.

    Of a hub id that is not listed its config.json is got, and nothing else.

    Raises:
        UserError: it cannot be got, or is of a family that kdjax does not know.
    """
    hf = CONFIGS.get(source) or hub_config(source)
    return None if hf is None else family_named(hf.get("model_type")).config_from_hf(hf)
