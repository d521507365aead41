"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): an encoder with rotary positions, windows and gated mlps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdjax.errors import UserError
from kdjax.models.bert import head_to_hf, with_head
from kdjax.models.config import ModelConfig, Rope
from kdjax.models.family import (
    Family,
    Weight,
    dense,
    hf_activation,
    hf_common,
    norm,
    read,
    read_activation,
    refuse_others,
)
from kdjax.models.hf_rope import read_rope
from kdjax.models.hf_windows import read_windows, write_windows

THETAS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}
"""Kind of layer -> version 4's key of the base of its angles, and what an absent one means."""


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type modernbert describes."""
    refuse_others(hf, {"classifier_pooling": ("cls",)} if "SequenceClass" in str(hf.get("architectures")) else {})
    width, heads = read(hf, "hidden_size", int, 768), read(hf, "num_attention_heads", int, 12)
    layers, max_positions = read(hf, "num_hidden_layers", int, 22), read(hf, "max_position_embeddings", int, 8192)
    if width % heads:
        raise UserError(f"hidden_size {width} does not divide by num_attention_heads {heads}")
    every, mlp_bias = read(hf, "global_attn_every_n_layers", int, 3), read(hf, "mlp_bias", bool, False)
    refuse_others(hf, {"classifier_bias": (mlp_bias,)} if "classifier_bias" in hf else {})
    window = read(hf, "local_attention", int, 128) // 2 + 1
    windows = read_windows(hf | {"sliding_window": window}, layers, lambda layer: layer % every > 0, window)
    rope, local_rope = (_rope(hf, kind, max_positions) for kind in THETAS)
    bias = read(hf, "attention_bias", bool, False)
    config = ModelConfig(
        family="modernbert",
        vocab_size=read(hf, "vocab_size", int, 50_368),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=read(hf, "intermediate_size", int, 1152),
        max_positions=max_positions,
        norm="layer",
        norm_eps=read(hf, "norm_eps", float, 1e-5),
        norm_bias=read(hf, "norm_bias", bool, False),
        embedding_norm=True,
        unnormed=(0,),
        causal=False,
        activation=read_activation(hf, "hidden_activation", "gelu"),
        rope=rope,
        local_rope=local_rope,
        windows=windows,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=mlp_bias,
    )
    between: Any = read_activation(hf, "classifier_activation", "gelu")
    config = with_head(config, hf, masked=between, pooled=between)
    if config.labels:
        return replace(config, head_norm=True)
    return config if config.task == "embedding" else replace(config, head_bias=read(hf, "decoder_bias", bool, True))


def _rope(hf: dict[str, Any], kind: str, max_positions: int) -> Rope:
    """Return the rotary positions of the layers that see all, or of those that have a window."""
    parameters, (key, theta) = hf.get("rope_parameters") or {}, THETAS[kind]
    own = parameters.get(kind) if isinstance(parameters, dict) else parameters
    without = {name: value for name, value in hf.items() if name != "rope_parameters"}
    theta = read(hf, key, float, theta)
    return read_rope(without | {"rope_theta": theta} | ({"rope_parameters": own} if own else {}), max_positions)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    architecture, head = head_to_hf(config, "ModernBert")
    windows = write_windows(config.windows) if config.windows else {"layer_types": ["full_attention"] * config.layers}
    local = config.local_rope or Rope(THETAS["sliding_attention"][1])
    own = {
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "hidden_activation": hf_activation(config.activation),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "classifier_bias": config.mlp_bias,
        "classifier_pooling": "cls",
        "decoder_bias": config.head_bias or config.head_transform == "none",
        "local_attention": 2 * (max(config.windows, default=65) - 1),
        "layer_types": windows["layer_types"],
        "global_rope_theta": config.rope.theta,
        "local_rope_theta": local.theta,
    }
    if config.head_transform != "none":
        own["classifier_activation"] = hf_activation(config.head_transform)
    return hf_common(config, "modernbert", architecture) | own | head


_LAYER = "model.layers.{}."

WEIGHTS = {
    "embed/embedding": Weight("model.embeddings.tok_embeddings.weight", "V,D", "VD"),
    **norm("embed_norm", "model.embeddings.norm"),
    **norm("layers/attention_norm", f"{_LAYER}attn_norm", first=1),
    **dense("layers/attention/out", f"{_LAYER}attn.Wo", "D,HK", "HKD"),
    **norm("layers/mlp_norm", f"{_LAYER}mlp_norm"),
    **dense("layers/mlp/down", f"{_LAYER}mlp.Wo", "D,F", "FD"),
    **norm("final_norm", "model.final_norm"),
    **dense("head_transform", "head.dense", "Z,D", "DZ"),
    **norm("head_norm", "head.norm"),
    **dense("head", "decoder", "V,D", "DV"),
    **dense("classifier_transform", "head.dense", "Z,D", "DZ"),
    **norm("classifier_norm", "head.norm"),
    **dense("classifier", "classifier", "Y,D", "DY"),
}
for _part, (_name, _heads) in enumerate((("q", "H"), ("k", "G"), ("v", "G"))):
    _path = f"layers/attention/{_name}"
    WEIGHTS[f"{_path}/kernel"] = Weight(f"{_LAYER}attn.Wqkv.weight", "HK+GK+GK,D", f"D{_heads}K", _part)
    WEIGHTS[f"{_path}/bias"] = Weight(f"{_LAYER}attn.Wqkv.bias", "HK+GK+GK", f"{_heads}K", _part)
for _part, _name in enumerate(("gate", "up")):
    WEIGHTS[f"layers/mlp/{_name}/kernel"] = Weight(f"{_LAYER}mlp.Wi.weight", "F+F,D", "DF", _part)
    WEIGHTS[f"layers/mlp/{_name}/bias"] = Weight(f"{_LAYER}mlp.Wi.bias", "F+F", "F", _part)

MODERNBERT = Family(
    config_from_hf,
    config_to_hf,
    WEIGHTS,
    prefix="model.",
    ignored=r".*rotary_emb\..*|decoder\.weight",
)
