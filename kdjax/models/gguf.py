"""Turns a llama GGUF file into a Hugging Face style directory, so that every model enters kdjax by one door.

The weights are written as float32, 4 bytes each whatever the file's type: a dequantised weight is scale·q + offset,
which no 16-bit type holds exactly, so that one would cost the parity (SmolLM2-135M: 98 MB become 538 MB).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from kdjax.errors import UserError, listed
from kdjax.models.files import whole_directory, write_json, write_safetensors
from kdjax.models.model_file import LazyTensor

WEIGHTS = {
    "token_embd.weight": ("model.embed_tokens.weight", "VD"),
    "output_norm.weight": ("model.norm.weight", "D"),
    "output.weight": ("lm_head.weight", "VD"),
}
"""GGUF name -> Hugging Face name, and the sizes that its shape must have."""

LAYER_WEIGHTS = {
    "attn_norm.weight": ("input_layernorm.weight", "D"),
    "attn_q.weight": ("self_attn.q_proj.weight", "QD"),
    "attn_k.weight": ("self_attn.k_proj.weight", "KD"),
    "attn_v.weight": ("self_attn.v_proj.weight", "KD"),
    "attn_output.weight": ("self_attn.o_proj.weight", "DQ"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "D"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "FD"),
    "ffn_up.weight": ("mlp.up_proj.weight", "FD"),
    "ffn_down.weight": ("mlp.down_proj.weight", "DF"),
}
"""The same for each layer: ``blk.N.`` -> ``model.layers.N.``."""

KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
}
"""The ``llama.`` keys that a plain llama has; any other that is set would change the model, so it is refused."""

PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}
"""``tokenizer.ggml.pre`` -> how text is split before the merges."""

CONTROL, USER_DEFINED, UNUSED = (int(gguf.TokenType[name]) for name in ("CONTROL", "USER_DEFINED", "UNUSED"))


def to_directory(file: Path, out: Path) -> Path:
    """Return `out`, made from a GGUF file: config, weights, tokenizer and chat template, complete or not there at all.

    Raises:
        UserError: the file is damaged, or holds something else than a plain llama with a byte-level BPE tokenizer.
    """
    fields, tensors = _open(Path(file))
    config = _config(fields, tensors, file)
    names = _match(config, tensors, file)
    special = _special(fields, config["vocab_size"], file)
    tokenizer = _tokenizer(fields, special, config["vocab_size"], file)
    ids = {f"{kind}_token_id": special[kind] for kind in ("bos", "eos", "pad") if kind in special}

    def lazy(name: str) -> LazyTensor:
        shape = tuple(reversed(tensors[name].shape.tolist()))
        return LazyTensor(shape, lambda index: _read(tensors[name], config, file)[index])

    with whole_directory(Path(out)) as directory:
        write_json(directory / "config.json", config | ids)
        write_json(directory / "generation_config.json", ids)
        write_json(directory / "tokenizer_config.json", _tokenizer_config(fields, special, config))
        tokenizer.save(str(directory / "tokenizer.json"))
        write_safetensors(directory / "model.safetensors", {hf: lazy(name) for hf, name in names.items()})
    return Path(out)


class _Reader(gguf.GGUFReader):
    """The package's reader, which at the end of a cut file would go on with empty arrays, for ever on a bad count."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        got = super()._get(offset, dtype, count, override_order)
        if len(got) != count:
            raise ValueError("it ends too early")
        return got


def _open(file: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Return the file's metadata and its tensors, whose data stay on disk."""
    if not file.is_file():
        raise UserError(f"no GGUF file {str(file)!r}")
    try:
        reader = _Reader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise UserError(f"{file} is not a whole GGUF file ({error}); download it again") from error
    if reader.byte_order != "I":
        raise UserError(f"{file} has the other byte order than this machine; get the little-endian file")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _config(fields: dict[str, Any], tensors: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the model's config.json, having refused what a plain llama does not have."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file} holds a {architecture!r} model; only the architecture 'llama' can be converted")
    keys = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    for name, value in keys.items():
        if name not in KEYS and value not in (0, "", "none"):
            raise UserError(f"{file} is not a plain llama: llama.{name} is {str(value)[:40]!r}, which is not supported")
    try:
        embedding = tensors["token_embd.weight"]
        heads = _whole(keys["attention.head_count"])
        head_width = _whole(keys.get("attention.key_length", _whole(keys["embedding_length"]) // heads))
        rope_theta = _short(keys.get("rope.freq_base", 10_000.0))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": _whole(embedding.shape.tolist()[-1]),
            "hidden_size": _whole(keys["embedding_length"]),
            "intermediate_size": _whole(keys["feed_forward_length"]),
            "num_hidden_layers": _whole(keys["block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": _whole(keys.get("attention.head_count_kv", heads)),
            "head_dim": head_width,
            "hidden_act": "silu",
            "max_position_embeddings": _whole(keys["context_length"]),
            "rms_norm_eps": _short(keys["attention.layer_norm_rms_epsilon"]),
            "rope_theta": rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in tensors,
            "torch_dtype": "float32",
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{file} lacks what a llama needs, or has it in a wrong form: {error}") from error
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_width) != head_width:
            raise UserError(
                f"{file} has {key} {keys[key]} and heads {head_width} wide; only equal widths are supported"
            )
    return config


def _special(fields: dict[str, Any], vocab_size: int, file: Path) -> dict[str, int]:
    """Return the ids of the special tokens that the file names, by their Hugging Face names."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {kind: fields.get(f"tokenizer.ggml.{name}_token_id") for kind, name in names.items()}
    for kind, index in found.items():
        if index is not None and not (isinstance(index, int) and 0 <= index < vocab_size):
            raise UserError(f"{file} names token {index!r} as {kind}, but has tokens 0 to {vocab_size - 1}")
    return {kind: index for kind, index in found.items() if index is not None}


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"got {value!r} where one positive whole number is wanted")
    return value


def _short(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _match(config: dict[str, Any], tensors: dict[str, Any], file: Path) -> dict[str, str]:
    """Return Hugging Face name -> GGUF name, having checked that all are there, no other is, and all shapes fit."""
    table = {name: row for name, row in WEIGHTS.items() if name != "output.weight" or name in tensors}
    for layer in range(min(config["num_hidden_layers"], len(tensors))):  # a damaged count may be billions
        for name, (hf, shape) in LAYER_WEIGHTS.items():
            table[f"blk.{layer}.{name}"] = (f"model.layers.{layer}.{hf}", shape)
    for problem, names in (("lacks", table.keys() - tensors.keys()), ("also has", tensors.keys() - table.keys())):
        if names:
            raise UserError(f"{file} is not a plain llama: it {problem} {len(names)} tensors: {listed(names)}")
    head_width = config["head_dim"]
    size = {
        "V": config["vocab_size"],
        "D": config["hidden_size"],
        "F": config["intermediate_size"],
        "Q": config["num_attention_heads"] * head_width,
        "K": config["num_key_value_heads"] * head_width,
    }
    for name, (_, letters) in table.items():
        got, wanted = tensors[name].shape.tolist()[::-1], [size[letter] for letter in letters]
        if got != wanted:
            raise UserError(f"{file}: tensor {name} has shape {got}, but the file's own header says {wanted}")
    return {hf: name for name, (hf, _) in table.items()}


def _read(tensor: gguf.ReaderTensor, config: dict[str, Any], file: Path) -> np.ndarray:
    try:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"{file}: tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be read") from error
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
    kind = tensor.name.split(".", 2)[-1]
    return unpermute(weight, config[heads[kind]]) if kind in heads else weight


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return query or key rows in Hugging Face's order: GGUF pairs neighbouring rows for RoPE, Hugging Face halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any], special: dict[str, int], vocab_size: int, file: Path) -> Tokenizer:
    kind, split = (fields.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or split not in PRE_TOKENIZERS:
        raise UserError(
            f"{file} has a tokenizer of kind {kind!r}, pre-tokenizer {split!r}; "
            f"supported are 'gpt2' (byte-level BPE) with {', '.join(map(repr, PRE_TOKENIZERS))}"
        )
    try:
        tokens, types, merges = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
        named = list(zip(tokens, types, strict=True))
        vocabulary = {token: i for i, (token, kind) in enumerate(named) if kind != UNUSED}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    except Exception as error:
        raise UserError(f"{file} has a damaged tokenizer: {error}") from error
    if len(tokens) != vocab_size:
        raise UserError(f"{file} has {len(tokens)} tokens but embeds {vocab_size}")
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in named:
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    if fields.get("tokenizer.ggml.add_bos_token") and "bos" in special:
        bos = tokens[special["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            pair=["bos", "$A", "$B"],
            special_tokens=[{"id": "bos", "ids": [special["bos"]], "tokens": [bos]}],
        )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any], special: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    template = fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # without it transformers 4's generate fails
        **{f"{kind}_token": tokens[index] for kind, index in special.items()},
        **({"chat_template": template} if template else {}),
    }
