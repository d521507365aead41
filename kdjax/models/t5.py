"""T5 (Raffel et al. 2019, arXiv:1910.10683), its version 1.1 and Flan-T5: encoder-decoders with relative positions."""

from __future__ import annotations

from typing import Any

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig
from kdjax.models.family import HF_ACTIVATIONS, Family, Weight, hf_activation, read, refuse_others

ACTIVATIONS = {"gated-gelu": "gelu_tanh"}
"""What a feed_forward_proj means that does not name its activation."""


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type t5 describes."""
    refuse_others(hf, {"is_encoder_decoder": (True,), "is_decoder": (False,)})
    name = (read(hf, "architectures", list, ["T5ForConditionalGeneration"]) or ["none"])[0]
    if name not in ("T5ForConditionalGeneration", "T5WithLMHeadModel"):
        raise UserError(f"architectures is {name!r}; of T5 kdjax computes T5ForConditionalGeneration")
    activation, gated = _feed_forward(read(hf, "feed_forward_proj", str, "relu"))
    width, heads = read(hf, "d_model", int, 512), read(hf, "num_heads", int, 8)
    start = hf.get("decoder_start_token_id") or 0
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise UserError(f"decoder_start_token_id is {start!r}; wanted a token, a whole number from 0")
    tied, layers = read(hf, "tie_word_embeddings", bool, True), read(hf, "num_layers", int, 6)
    return ModelConfig(
        family="t5",
        vocab_size=read(hf, "vocab_size", int, 32_128),
        width=width,
        layers=read(hf, "num_decoder_layers", int, layers),
        encoder_layers=layers,
        start_token=start,
        heads=heads,
        kv_heads=heads,
        head_width=read(hf, "d_kv", int, 64),
        mlp_width=read(hf, "d_ff", int, 2048),
        max_positions=read(hf, "n_positions", int, 512),
        norm_eps=read(hf, "layer_norm_epsilon", float, 1e-6),
        activation=activation,
        gated_mlp=gated,
        positions="relative",
        relative_buckets=read(hf, "relative_attention_num_buckets", int, 32),
        relative_distance=read(hf, "relative_attention_max_distance", int, 128),
        attention_scale=1.0,
        tie_head=tied,
        head_scale=width**-0.5 if read(hf, "scale_decoder_outputs", bool, tied) else None,
    )


def _feed_forward(name: str) -> tuple[Any, bool]:
    """Return our activation, and whether it gates, of a feed_forward_proj such as gated-gelu."""
    activation = name.removeprefix("gated-")
    if name not in ACTIVATIONS and activation not in HF_ACTIVATIONS:
        raise UserError(f"feed_forward_proj is {name!r}; wanted one of {', '.join(HF_ACTIVATIONS)}, or gated-…")
    return ACTIVATIONS.get(name) or HF_ACTIVATIONS[activation], name != activation


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    plain = ("gated-" if config.gated_mlp else "") + hf_activation(config.activation)
    names = {(activation, True): name for name, activation in ACTIVATIONS.items()}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": names.get((config.activation, config.gated_mlp), plain),
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "tie_word_embeddings": config.tie_head,
        "scale_decoder_outputs": config.head_scale is not None,
        "dropout_rate": config.dropout,
        "decoder_start_token_id": config.start_token,
    }


def _attention(path: str, name: str, layers: str) -> dict[str, Weight]:
    kernels = {"q": ("HK,D", "DHK"), "k": ("GK,D", "DGK"), "v": ("GK,D", "DGK"), "out": ("D,HK", "HKD")}
    return {
        f"{path}/{ours}/kernel": Weight(f"{name}.{ours[0]}.weight", *letters, layers=layers)
        for ours, letters in kernels.items()
    }


def _half(ours: str, theirs: str, layers: str, branches: tuple[str, ...]) -> dict[str, Weight]:
    """Return where the weights of the encoder or the decoder lie."""
    block, weights = f"{theirs}.block.{{}}.layer.", {}
    names = {"attention": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
    for number, branch in enumerate(branches):
        path, name = f"{ours}layers/{branch}", f"{block}{number}.{names[branch]}"
        weights |= _mlp(path, name, layers) if branch == "mlp" else _attention(path, name, layers)
        weights[f"{path}_norm/scale"] = Weight(f"{block}{number}.layer_norm.weight", "D", "D", layers=layers)
    bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return weights | {
        f"{ours}relative/embedding": Weight(bias, "U,H", "UH"),
        f"{ours}final_norm/scale": Weight(f"{theirs}.final_layer_norm.weight", "D", "D"),
    }


def _mlp(path: str, name: str, layers: str) -> dict[str, Weight]:
    return {
        f"{path}/gate/kernel": Weight(f"{name}.wi_0.weight", "F,D", "DF", layers=layers),
        f"{path}/up/kernel": Weight(f"{name}.wi_1.weight", "F,D", "DF", layers=layers),
        f"{path}/down/kernel": Weight(f"{name}.wo.weight", "D,F", "FD", layers=layers),
    }


WEIGHTS = {
    "embed/embedding": Weight("shared.weight", "V,D", "VD"),
    **_half("encoder/", "encoder", "M", ("attention", "mlp")),
    **_half("", "decoder", "L", ("attention", "cross", "mlp")),
    "head/kernel": Weight("lm_head.weight", "V,D", "DV"),
}

PLAIN = {
    "encoder/layers/mlp/up/kernel": Weight(
        "encoder.block.{}.layer.1.DenseReluDense.wi.weight", "F,D", "DF", layers="M"
    ),
    "layers/mlp/up/kernel": Weight("decoder.block.{}.layer.2.DenseReluDense.wi.weight", "F,D", "DF"),
}

T5 = Family(
    config_from_hf,
    config_to_hf,
    WEIGHTS,
    prefix="",
    ignored=r"lm_head\.weight|(en|de)coder\.embed_tokens\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    plain=PLAIN,
)
