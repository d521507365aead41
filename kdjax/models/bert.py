"""BERT (Devlin et al. 2018, arXiv:1810.04805), RoBERTa (Liu et al. 2019, arXiv:1907.11692) and DistilBERT (Sanh et al.

2019, arXiv:1910.01108): encoders whose branches are normalised after they are added, with the heads that they come
with: of a masked language model, of a classifier, or none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig
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
    with_defaults,
)

HEADS = ("ForMaskedLM", "ForSequenceClassification", "Model")
"""How the architectures' names end, by the head that they have."""


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type bert describes."""
    allowed = {"is_decoder": (False, None), "add_cross_attention": (False, None)}
    refuse_others(hf, allowed | {"position_embedding_type": ("absolute", None)})
    width, heads = read(hf, "hidden_size", int, 768), read(hf, "num_attention_heads", int, 12)
    if width % heads:
        raise UserError(f"hidden_size {width} does not divide by num_attention_heads {heads}")
    activation = read_activation(hf, "hidden_act", "gelu")
    config = ModelConfig(
        family="bert",
        vocab_size=read(hf, "vocab_size", int, 30_522),
        width=width,
        layers=read(hf, "num_hidden_layers", int, 12),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=read(hf, "intermediate_size", int, 3072),
        max_positions=read(hf, "max_position_embeddings", int, 512),
        norm="layer",
        norm_eps=read(hf, "layer_norm_eps", float, 1e-12),
        norms="sum",
        embedding_norm=True,
        causal=False,
        activation=activation,
        gated_mlp=False,
        positions="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        token_types=read(hf, "type_vocab_size", int, 2),
    )
    return with_head(config, hf, masked=activation, pooled="tanh")


def with_head(config: ModelConfig, hf: dict[str, Any], *, masked: str, pooled: Any) -> ModelConfig:
    """Return an encoder with the head that `architectures` names: that of a masked language model if it is silent.

    Args:
        config: the encoder without a head.
        hf: its config.json.
        masked: the activation before a masked language model's head, which a norm follows.
        pooled: that before a classifier's.
    """
    named = read(hf, "architectures", list, ["ForMaskedLM"])
    name = str(named[0]) if named else "ForMaskedLM"
    if name.endswith("ForSequenceClassification"):
        labels = len(read(hf, "id2label", dict, {0: "", 1: ""}))
        if not labels:
            raise UserError("id2label is empty; wanted a name for each label")
        return replace(config, labels=labels, tie_head=False, head_transform=pooled, head_bias=True)
    if name.endswith("Model"):
        return config
    if not name.endswith(("ForMaskedLM", "ForPreTraining")):
        wanted = ", ".join(f"…{end}" for end in HEADS)
        raise UserError(f"architectures is {named}, a head that kdjax does not compute; wanted one of {wanted}")
    tied: Any = {"tie_head": read(hf, "tie_word_embeddings", bool, True), "head_transform": masked}
    return replace(config, **tied, head_norm=True, head_bias=True)


def head_to_hf(config: ModelConfig, name: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the architecture with its head, and what more its config.json says."""
    if config.labels:
        id2label = {str(label): f"LABEL_{label}" for label in range(config.labels)}
        more = {"id2label": id2label, "label2id": {text: int(label) for label, text in id2label.items()}}
        return f"{name}ForSequenceClassification", more | {"tie_word_embeddings": True}
    return name + ("Model" if config.head_transform == "none" else "ForMaskedLM"), {}


def config_to_hf(config: ModelConfig, model_type: str = "bert", name: str = "Bert") -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    architecture, head = head_to_hf(config, name)
    own = {
        "hidden_act": hf_activation(config.activation),
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.token_types,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
    }
    return hf_common(config, model_type, architecture) | own | head


def roberta_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type roberta describes: positions count from the padding."""
    pad = hf.get("pad_token_id", 1)
    if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < 100:
        raise UserError(f"pad_token_id is {pad!r}; wanted a number from 0, after which positions are counted")
    defaults = {"vocab_size": 50_265, "max_position_embeddings": 512}
    config = config_from_hf(with_defaults(hf, defaults) | {"architectures": ["RobertaModel"]})
    if config.max_positions < pad + 2:
        raise UserError(f"max_position_embeddings is {config.max_positions}, none of which is left; wanted {pad + 2}")
    config = replace(config, family="roberta", max_positions=config.max_positions - pad - 1, first_position=pad + 1)
    return with_head(config, hf, masked="gelu", pooled="tanh")


def roberta_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    rows, pad = config.max_positions + config.first_position, config.first_position - 1
    return config_to_hf(config, "roberta", "Roberta") | {"max_position_embeddings": rows, "pad_token_id": pad}


DISTIL = {
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}
"""DistilBERT's name of a key -> BERT's."""


def distilbert_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the architecture that a config.json of model_type distilbert describes."""
    renamed = {DISTIL.get(key, key): value for key, value in hf.items()}
    as_bert = {"type_vocab_size": 1, "layer_norm_eps": 1e-12, "architectures": ["BertModel"]}
    config = config_from_hf(with_defaults(renamed, {"num_hidden_layers": 6}) | as_bert)
    config = replace(config, family="distilbert", token_types=0)
    return with_head(config, hf, masked=config.activation, pooled="relu")


def distilbert_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of such an architecture; transformers 4 and 5 both read it."""
    hf = config_to_hf(config, "distilbert", "DistilBert")
    theirs = {value: key for key, value in DISTIL.items()}
    left_out = ("type_vocab_size", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob")
    return {theirs.get(key, key): value for key, value in hf.items() if key not in left_out} | {
        "dropout": config.dropout,
        "attention_dropout": 0.0,
    }


def _bert_weights(model: str) -> dict[str, Weight]:
    """Return where the weights of BERT's layers and embeddings lie, `model` being the first part of their names."""
    layer, embeddings = f"{model}.encoder.layer.{{}}.", f"{model}.embeddings."
    return {
        "embed/embedding": Weight(f"{embeddings}word_embeddings.weight", "V,D", "VD"),
        "positions/embedding": Weight(f"{embeddings}position_embeddings.weight", "T,D", "TD"),
        "types/embedding": Weight(f"{embeddings}token_type_embeddings.weight", "X,D", "XD"),
        **norm("embed_norm", f"{embeddings}LayerNorm"),
        **dense("layers/attention/q", f"{layer}attention.self.query", "HK,D", "DHK"),
        **dense("layers/attention/k", f"{layer}attention.self.key", "GK,D", "DGK"),
        **dense("layers/attention/v", f"{layer}attention.self.value", "GK,D", "DGK"),
        **dense("layers/attention/out", f"{layer}attention.output.dense", "D,HK", "HKD"),
        **norm("layers/attention_sum_norm", f"{layer}attention.output.LayerNorm"),
        **dense("layers/mlp/up", f"{layer}intermediate.dense", "F,D", "DF"),
        **dense("layers/mlp/down", f"{layer}output.dense", "D,F", "FD"),
        **norm("layers/mlp_sum_norm", f"{layer}output.LayerNorm"),
    }


BERT_WEIGHTS = _bert_weights("bert") | {
    **dense("head_transform", "cls.predictions.transform.dense", "Z,D", "DZ"),
    **norm("head_norm", "cls.predictions.transform.LayerNorm"),
    "head/kernel": Weight("cls.predictions.decoder.weight", "V,D", "DV"),
    "head/bias": Weight("cls.predictions.bias", "V", "V"),
    **dense("classifier_transform", "bert.pooler.dense", "Z,D", "DZ"),
    **dense("classifier", "classifier", "Y,D", "DY"),
}

ROBERTA_WEIGHTS = _bert_weights("roberta") | {
    **dense("head_transform", "lm_head.dense", "Z,D", "DZ"),
    **norm("head_norm", "lm_head.layer_norm"),
    "head/kernel": Weight("lm_head.decoder.weight", "V,D", "DV"),
    "head/bias": Weight("lm_head.bias", "V", "V"),
    **dense("classifier_transform", "classifier.dense", "Z,D", "DZ"),
    **dense("classifier", "classifier.out_proj", "Y,D", "DY"),
}

_LAYER = "distilbert.transformer.layer.{}."

DISTILBERT_WEIGHTS = {
    "embed/embedding": Weight("distilbert.embeddings.word_embeddings.weight", "V,D", "VD"),
    "positions/embedding": Weight("distilbert.embeddings.position_embeddings.weight", "T,D", "TD"),
    **norm("embed_norm", "distilbert.embeddings.LayerNorm"),
    **dense("layers/attention/q", f"{_LAYER}attention.q_lin", "HK,D", "DHK"),
    **dense("layers/attention/k", f"{_LAYER}attention.k_lin", "GK,D", "DGK"),
    **dense("layers/attention/v", f"{_LAYER}attention.v_lin", "GK,D", "DGK"),
    **dense("layers/attention/out", f"{_LAYER}attention.out_lin", "D,HK", "HKD"),
    **norm("layers/attention_sum_norm", f"{_LAYER}sa_layer_norm"),
    **dense("layers/mlp/up", f"{_LAYER}ffn.lin1", "F,D", "DF"),
    **dense("layers/mlp/down", f"{_LAYER}ffn.lin2", "D,F", "FD"),
    **norm("layers/mlp_sum_norm", f"{_LAYER}output_layer_norm"),
    **dense("head_transform", "vocab_transform", "Z,D", "DZ"),
    **norm("head_norm", "vocab_layer_norm"),
    "head/kernel": Weight("vocab_projector.weight", "V,D", "DV"),
    "head/bias": Weight("vocab_projector.bias", "V", "V"),
    **dense("classifier_transform", "pre_classifier", "Z,D", "DZ"),
    **dense("classifier", "classifier", "Y,D", "DY"),
}

BERT = Family(
    config_from_hf,
    config_to_hf,
    BERT_WEIGHTS,
    prefix="bert.",
    ignored=r"embeddings\.position_ids|pooler\..*|cls\.seq_relationship\..*|cls\.predictions\.decoder\.(weight|bias)",
)
ROBERTA = Family(
    roberta_from_hf,
    roberta_to_hf,
    ROBERTA_WEIGHTS,
    prefix="roberta.",
    ignored=r"embeddings\.position_ids|pooler\..*|lm_head\.decoder\.(weight|bias)",
)
DISTILBERT = Family(
    distilbert_from_hf,
    distilbert_to_hf,
    DISTILBERT_WEIGHTS,
    prefix="distilbert.",
    ignored=r"embeddings\.position_ids|vocab_projector\.weight",
)
