"""GPT-2 (Radford et al. 2019) as Hugging Face stores it: matrices untransposed, queries, keys and values fused."""

from __future__ import annotations

from typing import Any

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig
from kdjax.models.family import Family, Weight, hf_activation, read, read_activation, refuse_others

_FUSED = {
    f"layers/attention/{name}/{kind}": Weight("transformer.h.{}.attn.c_attn." + on_disk, disk, ours, part)
    for part, name in enumerate("qkv")
    for kind, on_disk, disk, ours in (("kernel", "weight", "D,3HK", "DHK"), ("bias", "bias", "3HK", "HK"))
}

WEIGHTS = _FUSED | {
    "embed/embedding": Weight("transformer.wte.weight", "V,D", "VD"),
    "positions/embedding": Weight("transformer.wpe.weight", "T,D", "TD"),
    "layers/attention_norm/scale": Weight("transformer.h.{}.ln_1.weight", "D", "D"),
    "layers/attention_norm/bias": Weight("transformer.h.{}.ln_1.bias", "D", "D"),
    "layers/attention/out/kernel": Weight("transformer.h.{}.attn.c_proj.weight", "HK,D", "HKD"),
    "layers/attention/out/bias": Weight("transformer.h.{}.attn.c_proj.bias", "D", "D"),
    "layers/mlp_norm/scale": Weight("transformer.h.{}.ln_2.weight", "D", "D"),
    "layers/mlp_norm/bias": Weight("transformer.h.{}.ln_2.bias", "D", "D"),
    "layers/mlp/up/kernel": Weight("transformer.h.{}.mlp.c_fc.weight", "D,F", "DF"),
    "layers/mlp/up/bias": Weight("transformer.h.{}.mlp.c_fc.bias", "F", "F"),
    "layers/mlp/down/kernel": Weight("transformer.h.{}.mlp.c_proj.weight", "F,D", "FD"),
    "layers/mlp/down/bias": Weight("transformer.h.{}.mlp.c_proj.bias", "D", "D"),
    "final_norm/scale": Weight("transformer.ln_f.weight", "D", "D"),
    "final_norm/bias": Weight("transformer.ln_f.bias", "D", "D"),
    "head/kernel": Weight("lm_head.weight", "V,D", "DV"),
}

COMPUTED = {
    "quantization_config": (None,),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
}


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type gpt2 describes; dropout is the training's affair."""
    refuse_others(hf, COMPUTED)
    width, heads = read(hf, "n_embd", int, 768), read(hf, "n_head", int, 12)
    if width % heads:
        raise UserError(f"n_embd {width} does not divide by n_head {heads}")
    return ModelConfig(
        family="gpt2",
        vocab_size=read(hf, "vocab_size", int, 50257),
        width=width,
        layers=read(hf, "n_layer", int, 12),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=read(hf, "n_inner", int, 4 * width),
        max_positions=read(hf, "n_positions", int, 1024),
        norm="layer",
        norm_eps=read(hf, "layer_norm_epsilon", float, 1e-5),
        activation=read_activation(hf, "activation_function", "gelu_new"),
        gated_mlp=False,
        positions="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_head=read(hf, "tie_word_embeddings", bool, True),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": hf_activation(config.activation),
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tie_head,
    }


GPT2 = Family(
    config_from_hf,
    config_to_hf,
    WEIGHTS,
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight",
)
