"""GGUF to a directory: every weight in its place and order, a tokenizer that is the same, and no damaged file taken."""

import json
import struct

import gguf
import jinja2
import numpy as np
import pytest
import tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from kdjax.errors import UserError
from kdjax.models import open_model
from kdjax.models.gguf import to_directory


@pytest.fixture
def converted(tmp_path):
    return to_directory(tiny_gguf.write(tmp_path / "tiny.gguf"), tmp_path / "out")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.from_file(str(to_directory(tiny_gguf.write(path / "t.gguf"), path / "out") / "tokenizer.json"))


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_weights_return_to_the_order_they_had_before_llama_cpp_permuted_them(tmp_path, tied):
    got = load_file(
        to_directory(tiny_gguf.write(tmp_path / "t.gguf", tied=tied), tmp_path / "out") / "model.safetensors"
    )
    wanted = tiny_gguf.hf_weights(tied=tied)
    assert got.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(got[name], weight, err_msg=name)
    assert read_json(tmp_path / "out/config.json")["tie_word_embeddings"] is tied


@pytest.mark.parametrize(("kind", "error"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q4_1", 0.3)])
def test_every_type_keeps_its_values_exactly(tmp_path, kind, error):
    got = load_file(
        to_directory(tiny_gguf.write(tmp_path / "t.gguf", kind=kind), tmp_path / "out") / "model.safetensors"
    )
    original = tiny_gguf.hf_weights()
    name, quantised = "model.layers.1.mlp.down_proj.weight", gguf.GGMLQuantizationType[kind]
    np.testing.assert_array_equal(got[name], gguf.dequantize(gguf.quantize(original[name], quantised), quantised))
    for name, weight in original.items():  # rows permuted wrongly would be off by whole weights, of size 1
        assert got[name].dtype == np.float32
        assert np.abs(got[name] - weight).max() < error, name


def test_a_model_opened_from_the_file_has_its_heads_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "cache"))
    file = open_model(str(tiny_gguf.write(tmp_path / "t.gguf")))
    assert (file.config.layers, file.config.rope.theta, file.config.tie_head) == (2, 50_000.0, True)
    q_LDHK = file.tensors["layers"]["attention"]["q"]["kernel"].all()
    rows_QD = tiny_gguf.hf_weights()["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q_LDHK[1], rows_QD.T.reshape(64, 4, 16))


def test_config_says_what_transformers_4_and_5_read(converted):
    config = read_json(converted / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    assert config["rms_norm_eps"] == 1e-5  # float32 has 9.999999747378752e-06
    wanted = {
        "model_type": "llama",
        "vocab_size": len(tiny_gguf.TOKENS),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert read_json(converted / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_tokenizer_splits_digits_merges_and_knows_special_tokens(tokenizer):
    encoding = tokenizer.encode("<|im_start|>hello world 12<|im_end|>", add_special_tokens=False)
    assert encoding.tokens == ["<|im_start|>", "he", "ll", "o", "Ġw", *"orld", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(encoding.ids) == "hello world 12"
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == "<|im_start|>hello world 12<|im_end|>"


def test_without_the_digit_rule_numbers_merge(tmp_path):
    file = tiny_gguf.write(tmp_path / "t.gguf", tokenizer={"ggml.pre": "gpt-2"})
    tokenizer = Tokenizer.from_file(str(to_directory(file, tmp_path / "out") / "tokenizer.json"))
    assert tokenizer.encode("x12").tokens == ["x", "12"]


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_bos_is_put_first_where_the_file_asks_for_it(tmp_path):
    file = tiny_gguf.write(tmp_path / "t.gguf", tokenizer={"ggml.add_bos_token": True})
    tokenizer = Tokenizer.from_file(str(to_directory(file, tmp_path / "out") / "tokenizer.json"))
    assert tokenizer.encode("he").tokens == ["<|im_start|>", "he"]
    assert tokenizer.encode("he", add_special_tokens=False).tokens == ["he"]


def test_chat_template_and_special_tokens_are_kept(converted):
    config = read_json(converted / "tokenizer_config.json")
    text = jinja2.Template(config["chat_template"]).render(messages=[{"role": "user", "content": "hé"}])
    assert text == "<|im_start|>user\nhé<|im_end|>\n"
    names = {key: config[f"{key}_token"] for key in ("bos", "eos", "pad", "unk")}
    assert names == {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}


REFUSED = {
    "architecture": ({"keys": {"architecture": "gemma3"}}, "'gemma3'.*only the architecture 'llama'"),
    "rope scaling": ({"keys": {"rope.scaling.type": "linear"}}, "rope.scaling.type is 'linear'"),
    "experts": ({"keys": {"expert_count": 8}}, "expert_count is '8'"),
    "no layers": ({"keys": {"block_count": None}}, "block_count"),
    "billions of layers": ({"keys": {"block_count": 4_000_000_000}}, "lacks .*blk.10"),
    "heads by layer": ({"keys": {"attention.head_count": [4, 4]}}, r"got \[4, 4\]"),
    "partial rotation": ({"keys": {"rope.dimension_count": 8}}, "rope.dimension_count 8 and heads 16 wide"),
    "a scaling tensor": ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "also has 1 .*rope_freqs.weight"),
    "a missing tensor": ({"drop": ("blk.1.ffn_up.weight",)}, "lacks 1 .*blk.1.ffn_up.weight"),
    "another shape": ({"keys": {"feed_forward_length": 64}}, r"ffn_.* has shape .*96.*says .*64"),
    "sentencepiece": ({"tokenizer": {"ggml.model": "llama"}}, "tokenizer of kind 'llama'"),
    "pre-tokenizer": ({"tokenizer": {"ggml.pre": "qwen2"}}, "'qwen2'.*'smollm', 'gpt-2'"),
    "merges": ({"tokenizer": {"ggml.merges": ["q q"]}}, "damaged tokenizer"),
    "token types": ({"tokenizer": {"ggml.token_type": [1, 1]}}, "damaged tokenizer"),
    "special token": ({"tokenizer": {"ggml.eos_token_id": 99_999}}, "names token 99999 as eos"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_not_a_plain_llama_is_refused_in_one_line(tmp_path, change):
    arguments, message = REFUSED[change]
    file = tiny_gguf.write(tmp_path / "t.gguf", **arguments)
    with pytest.raises(UserError, match=message) as caught:
        to_directory(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


def test_a_type_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    name = "blk.1.ffn_down.weight"  # the last to be written: by then the file is half there
    integers = {name: np.ones((tiny_gguf.WIDTH, tiny_gguf.MLP), np.int8)}
    file = tiny_gguf.write(tmp_path / "t.gguf", drop=(name,), extra=integers)
    with pytest.raises(UserError, match="blk.1.ffn_down.weight is I8"):
        to_directory(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = tiny_gguf.write(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            to_directory(cut, tmp_path / "out")


def test_garbage_is_refused_and_a_huge_count_is_not_counted_to(tmp_path):
    bad = tmp_path / "bad.gguf"
    endless = struct.pack("<IIQQ", gguf.GGUF_MAGIC, 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    endless += struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, 2**60)
    for content in (b"not a model", b"PK\x03\x04" * 100, endless):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="not a whole GGUF file"):
            to_directory(bad, tmp_path / "out")


def test_flipped_bytes_in_the_header_convert_or_are_refused_in_one_line(tmp_path):
    whole = tiny_gguf.write(tmp_path / "whole.gguf").read_bytes()
    header, rng = whole.index(b"chat_template"), np.random.default_rng(0)
    flipped, outcomes = tmp_path / "flipped.gguf", set()
    for number in range(100):
        content = bytearray(whole)
        content[rng.integers(header)] = rng.integers(256)
        flipped.write_bytes(content)
        try:
            to_directory(flipped, tmp_path / f"out{number}")
            outcomes.add("converted")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"converted", "refused"}


def test_a_missing_file_and_a_taken_name_are_said(tmp_path, converted):
    with pytest.raises(UserError, match="no GGUF file"):
        to_directory(tmp_path / "absent.gguf", tmp_path / "new")
    with pytest.raises(UserError, match="out exists and is not an empty directory"):
        to_directory(tmp_path / "tiny.gguf", converted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]
