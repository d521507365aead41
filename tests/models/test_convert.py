"""Model directories: read lazily and exactly, refused when anything is amiss, exported and read back the same."""

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from jax.sharding import NamedSharding, PartitionSpec

from kdjax.errors import UserError
from kdjax.models import Model, ModelConfig, convert, export, open_model, select_layers
from kdjax.models.paths import parameter_paths

GOLDEN = Path(__file__).parent.parent / "golden"
TIED, UNTIED, GPT2, GEMMA2 = (GOLDEN / name for name in ("llama_tied", "llama_untied", "gpt2", "gemma2"))


def whole(file):
    return jax.tree.map(lambda tensor: tensor.all(), file.tensors)


def copy(source, out, change=None, config=None):
    """A golden directory with its tensors changed by `change(dict)` and its config.json updated."""
    shutil.copytree(source, out)
    if change is not None:
        tensors = safetensors.numpy.load_file(out / "model.safetensors")
        safetensors.numpy.save_file(change(tensors) or tensors, out / "model.safetensors")
    if config is not None:
        hf = json.loads((out / "config.json").read_text()) | config
        (out / "config.json").write_text(json.dumps(hf))
    return out


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("source", [TIED, UNTIED, GPT2, GEMMA2], ids=lambda p: p.name)
def test_any_part_reads_as_that_part_of_the_whole(source):
    rng = np.random.default_rng(0)
    for path, tensor in parameter_paths(open_model(str(source)).tensors).items():
        everything = tensor.all()
        assert everything.shape == tensor.shape and everything.dtype == tensor.dtype == np.float32
        for _ in range(3):
            starts = [int(rng.integers(size)) for size in tensor.shape]
            index = tuple(slice(a, int(rng.integers(a, n)) + 1) for a, n in zip(starts, tensor.shape, strict=True))
            np.testing.assert_array_equal(tensor.read(index), everything[index], err_msg=path)


def test_weights_go_straight_to_their_shards():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    tensor = open_model(str(TIED)).tensors["layers"]["mlp"]["up"]["kernel"]
    asked = []

    def read(index):
        asked.append(tensor.read(index).shape)
        return tensor.read(index)

    array = jax.make_array_from_callback(tensor.shape, NamedSharding(mesh, PartitionSpec(None, None, "fsdp")), read)
    assert asked == [(3, 32, 6)] * 8
    np.testing.assert_array_equal(array, tensor.all())


@pytest.mark.parametrize("source", [TIED, UNTIED, GPT2], ids=lambda p: p.name)
def test_an_export_reads_back_the_same(source, tmp_path):
    file = open_model(str(source))
    params = whole(file)
    back = open_model(str(export(file.config, params, tmp_path / "out", None)))
    assert back.config == file.config and back.sha256() == file.sha256() and back.tokenizer is None
    assert_same(whole(back), params)
    theirs = safetensors.numpy.load_file(source / "model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert_same(ours, theirs)
    lazily = export(file.config, file.tensors, tmp_path / "lazy", None)
    assert (lazily / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert stat.S_IMODE((lazily / "model.safetensors").stat().st_mode) & 0o444 == 0o444


def test_large_exports_are_split_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 40_000)
    file = open_model(str(GPT2))
    out = export(file.config, file.tensors, tmp_path / "out", None)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    index = json.loads((out / convert.INDEX).read_text())
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(whole(file)))
    assert all((out / name).stat().st_size < 45_000 for name in names)
    assert_same(whole(open_model(str(out))), whole(file))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_read_to_float32(tmp_path, dtype):
    half = copy(TIED, tmp_path / "half", lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()})
    for got, exact in zip(*(jax.tree.leaves(whole(open_model(str(d)))) for d in (half, TIED)), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, exact.astype(dtype).astype(np.float32))


def test_bfloat16_is_exported(tmp_path):
    file = open_model(str(TIED))
    out = export(file.config, file.tensors, tmp_path / "out", None, dtype="bfloat16")
    for got, exact in zip(*(jax.tree.leaves(whole(f)) for f in (open_model(str(out)), file)), strict=True):
        np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16).astype(np.float32))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tied_heads_saved_twice_are_read(tmp_path):
    def doubled(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    assert_same(whole(open_model(str(copy(TIED, tmp_path / "twice", doubled)))), whole(open_model(str(TIED))))


def test_names_with_and_without_prefix_and_old_buffers_are_read(tmp_path):
    def old_style(tensors):
        short = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        return short | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "lm_head.weight": short["wte.weight"]}

    assert_same(whole(open_model(str(copy(GPT2, tmp_path / "old", old_style)))), whole(open_model(str(GPT2))))


def drop(name):
    return lambda tensors: tensors.pop(name) is None


def grown(name):
    return lambda tensors: tensors.update({name: np.zeros((3, 3), np.float32)})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("source", "change", "config", "message"),
    [
        (TIED, drop(NORM), None, f"lacks 1 of the tensors its config.json asks for: {NORM}"),
        (TIED, grown(NORM), None, rf"{NORM} has shape \(3, 3\); its config.json says \(32,\)"),
        (
            TIED,
            grown("model.layers.3.mlp.x"),
            None,
            "1 more than the tensors its config.json asks for: model.layers.3.mlp.x",
        ),
        (TIED, None, {"tie_word_embeddings": False}, "lacks 1 of the tensors .*: lm_head.weight"),
        (UNTIED, None, {"num_hidden_layers": 2}, "16 more than the tensors its config.json asks"),
        (UNTIED, None, {"num_hidden_layers": 9_999}, "too few for the 9999 layers"),
        (UNTIED, None, {"num_hidden_layers": 10**9}, "layers is 1000000000; wanted at most 10,000"),
        (TIED, grown("a\nb"), None, r"1 more than the tensors its config.json asks for: 'a\\nb'"),
        (TIED, grown("norm.weight"), None, "has the tensor model.norm.weight twice"),
        (
            UNTIED,
            None,
            {"attention_bias": False},
            "12 more than the tensors its config.json asks for: model.layers.0.self_attn.k_proj.bias, ",
        ),
        (
            TIED,
            None,
            {"vocab_size": 129},
            r"embed_tokens.weight has shape \(128, 32\); its config.json says \(129, 32\)",
        ),
        (TIED, None, {"model_type": "lama"}, "config.json: model_type is 'lama'.*did you mean 'llama'"),
        (TIED, None, {"hidden_act": "mish"}, "config.json: hidden_act is 'mish'"),
    ],
)
def test_a_directory_that_does_not_fit_its_config_is_refused(tmp_path, source, change, config, message):
    directory = copy(source, tmp_path / "bad", change, config)
    with pytest.raises(UserError, match=message) as error:
        open_model(str(directory))
    assert str(directory) in str(error.value)


def index_of(directory, weight_map):
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    (directory / convert.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../part.safetensors"}, "names '../part.safetensors'; wanted plain names"),
        ({"a": "/etc/x.safetensors"}, "wanted plain names"),
        ({"a": "part.bin"}, "wanted plain names"),
        ({"a": "absent.safetensors"}, "lacks absent.safetensors"),
        ({"a": "part.safetensors", "b": "twin.safetensors"}, "is in another file of .* too"),
        ({}, "has no weight_map"),
        (["part.safetensors"], "has no weight_map"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, weight_map, message):
    directory = copy(TIED, tmp_path / "bad")
    index_of(directory, weight_map)
    shutil.copyfile(directory / "part.safetensors", directory / "twin.safetensors")
    with pytest.raises(UserError, match=message):
        open_model(str(directory))


def test_an_index_is_followed(tmp_path):
    directory = copy(TIED, tmp_path / "good")
    index_of(directory, {"anything": "part.safetensors"})
    assert_same(whole(open_model(str(directory))), whole(open_model(str(TIED))))


def test_pickled_or_no_weights_are_refused(tmp_path):
    directory = copy(TIED, tmp_path / "bad")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"weights pickled \(pytorch_model.bin\)"):
        open_model(str(directory))
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        open_model(str(directory))
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match="cannot read .*config.json"):
        open_model(str(directory))


def test_an_export_never_overwrites(tmp_path):
    file = open_model(str(TIED))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not an empty directory"):
        export(file.config, file.tensors, tmp_path / "out", None)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.txt"]


def test_what_the_family_cannot_say_is_not_exported(tmp_path):
    config = ModelConfig(norm="layer")
    params = jax.eval_shape(Model(config).init, jax.random.key(0))
    with pytest.raises(UserError, match="Hugging Face's llama has no norm='layer'"):
        export(config, params, tmp_path / "out", None)
    file = open_model(str(TIED))
    with pytest.raises(UserError, match="parameters do not fit their architecture"):
        export(replace(file.config, width=16), file.tensors, tmp_path / "out", None)
    with pytest.raises(UserError, match="dtype is 'int8'"):
        export(file.config, file.tensors, tmp_path / "out", None, dtype="int8")
    assert not (tmp_path / "out").exists()


def write_tokenizer(directory, **settings):
    directory.mkdir()
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    vocabulary.save(str(directory / "tokenizer.json"))
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory / "tokenizer.json"


def test_the_tokenizer_and_its_template_travel_along(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t", eos_token={"content": "<end>"}, chat_template="{{ messages }}")
    file = open_model(str(TIED))
    out = export(file.config, file.tensors, tmp_path / "out", tokenizer)
    assert (out / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}" and "token_type_ids" not in settings["model_input_names"]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 2}
    assert open_model(str(out)).tokenizer == out / "tokenizer.json"


def test_ids_come_from_the_generation_config_where_there_is_one(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": [2, 1], "temperature": 0.6}')
    file = open_model(str(TIED))
    out = export(file.config, file.tensors, tmp_path / "out", tokenizer)
    hf = json.loads((out / "config.json").read_text())
    assert hf["eos_token_id"] == [2, 1] and hf["bos_token_id"] is None
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert (out / "tokenizer_config.json").is_file()


def test_selected_layers_keep_their_order_and_the_rest():
    file = open_model(str(UNTIED))
    cut, params = select_layers(file, (2, 0)), whole(file)
    assert cut.config == replace(file.config, layers=2) and cut.tokenizer == file.tokenizer
    assert_same(whole(cut)["layers"], jax.tree.map(lambda x: x[np.array([2, 0])], params["layers"]))
    assert_same(whole(cut)["head"], params["head"])
    kernel = cut.tensors["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel.read((slice(1, 2), slice(3, 9), slice(None))), kernel.all()[1:2, 3:9])
    assert len({f.sha256() for f in (file, cut, select_layers(file, (0, 2)))}) == 3
    for keep in ((0, 3), (-1,), ()):
        with pytest.raises(UserError, match="wanted at least one, each from 0 to 2"):
            select_layers(file, keep)


def test_selected_layers_keep_their_windows():
    file = open_model(str(GEMMA2))
    assert file.config.windows == (5, 0, 5)
    assert select_layers(file, (1, 2)).config.windows == (0, 5)


def test_scales_stored_as_their_distance_from_1_are_read_and_written_so(tmp_path):
    file, stored = open_model(str(GEMMA2)), safetensors.numpy.load_file(GEMMA2 / "model.safetensors")
    scale = whole(file)["layers"]["attention_after_norm"]["scale"]
    np.testing.assert_array_equal(scale[1], 1 + stored["model.layers.1.post_attention_layernorm.weight"])
    export(file.config, whole(file), tmp_path / "out", None)
    for name, tensor in safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_allclose(tensor, stored[name], atol=1e-6, err_msg=name)


def test_the_hash_sees_every_weight(tmp_path):
    def nudge(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][31, 47] += 1e-3

    nudged = copy(TIED, tmp_path / "nudged", nudge)
    assert open_model(str(nudged)).sha256() != open_model(str(TIED)).sha256()
