"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) as Hugging Face stores it; Pythia is one too."""

from __future__ import annotations

from typing import Any

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig
from kdjax.models.family import Family, Weight, hf_activation, hf_common, read, read_activation, refuse_others
from kdjax.models.hf_rope import read_rope, write_rope

_LAYER = "gpt_neox.layers.{}."

_FUSED = {
    f"layers/attention/{name}/{kind}": Weight(f"{_LAYER}attention.query_key_value.{on_disk}", disk, ours, part)
    for part, name in enumerate("qkv")
    for kind, on_disk, disk, ours in (("kernel", "weight", "H3K,D", "DHK"), ("bias", "bias", "H3K", "HK"))
}

WEIGHTS = _FUSED | {
    "embed/embedding": Weight("gpt_neox.embed_in.weight", "V,D", "VD"),
    "layers/attention_norm/scale": Weight(_LAYER + "input_layernorm.weight", "D", "D"),
    "layers/attention_norm/bias": Weight(_LAYER + "input_layernorm.bias", "D", "D"),
    "layers/attention/out/kernel": Weight(_LAYER + "attention.dense.weight", "D,HK", "HKD"),
    "layers/attention/out/bias": Weight(_LAYER + "attention.dense.bias", "D", "D"),
    "layers/mlp_norm/scale": Weight(_LAYER + "post_attention_layernorm.weight", "D", "D"),
    "layers/mlp_norm/bias": Weight(_LAYER + "post_attention_layernorm.bias", "D", "D"),
    "layers/mlp/up/kernel": Weight(_LAYER + "mlp.dense_h_to_4h.weight", "F,D", "DF"),
    "layers/mlp/up/bias": Weight(_LAYER + "mlp.dense_h_to_4h.bias", "F", "F"),
    "layers/mlp/down/kernel": Weight(_LAYER + "mlp.dense_4h_to_h.weight", "D,F", "FD"),
    "layers/mlp/down/bias": Weight(_LAYER + "mlp.dense_4h_to_h.bias", "D", "D"),
    "final_norm/scale": Weight("gpt_neox.final_layer_norm.weight", "D", "D"),
    "final_norm/bias": Weight("gpt_neox.final_layer_norm.bias", "D", "D"),
    "head/kernel": Weight("embed_out.weight", "V,D", "DV"),
}

COMPUTED = {"quantization_config": (None,), "is_encoder_decoder": (None, False)}


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type gpt_neox describes; dropout is the training's affair."""
    refuse_others(hf, COMPUTED)
    width, heads = read(hf, "hidden_size", int), read(hf, "num_attention_heads", int)
    if width % heads:
        raise UserError(f"hidden_size {width} does not divide by num_attention_heads {heads}")
    max_positions, attention_bias = (
        read(hf, "max_position_embeddings", int, 2048),
        read(hf, "attention_bias", bool, True),
    )
    theta = {"rope_theta": read(hf, "rotary_emb_base", float, 10_000.0)}
    return ModelConfig(
        family="gpt_neox",
        vocab_size=read(hf, "vocab_size", int),
        width=width,
        layers=read(hf, "num_hidden_layers", int),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=read(hf, "intermediate_size", int, 4 * width),
        max_positions=max_positions,
        norm="layer",
        norm_eps=read(hf, "layer_norm_eps", float, 1e-5),
        parallel=read(hf, "use_parallel_residual", bool, True),
        activation=read_activation(hf, "hidden_act", "gelu"),
        gated_mlp=False,
        positions="rope",
        rope=read_rope(theta | hf, max_positions, read(hf, "rotary_pct", float, 0.25)),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=True,
        tie_head=read(hf, "tie_word_embeddings", bool, False),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    rope = write_rope(config.rope)
    hf = {
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "hidden_act": hf_activation(config.activation),
        "rotary_emb_base": rope.pop("rope_theta"),
        "rotary_pct": config.rope.share,
        "attention_bias": config.qkv_bias,
        "hidden_dropout": config.dropout,
        "attention_dropout": 0.0,
    }
    return hf_common(config, "gpt_neox", "GPTNeoXForCausalLM") | hf | rope


NEOX = Family(
    config_from_hf,
    config_to_hf,
    WEIGHTS,
    prefix="gpt_neox.",
    ignored=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|embed_out\.weight",
)
