"""What a user may call a model by, and what is said when there is none."""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import checkpoint
from kdjax.errors import UserError
from kdjax.models import Model, ModelConfig, fetch, open_model

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG = ModelConfig(vocab_size=33, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory; its saved step holds the parameters in the list that is given along."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "model.json").write_text(json.dumps(asdict(CONFIG)))
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    rng, shapes = np.random.default_rng(0), jax.eval_shape(Model(CONFIG).init, jax.random.key(0))
    params = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)]
    monkeypatch.setattr(
        checkpoint,
        "open_params",
        lambda path: checkpoint.OpenedParams(params[0], 7, "x") if path == directory else None,
    )
    return directory, params


def test_a_run_is_a_model(run):
    directory, (params,) = run
    file = open_model(str(directory))
    assert file.config == CONFIG and file.source == str(directory) and file.tokenizer == directory / "tokenizer.json"
    jax.tree.map(lambda tensor, x: np.testing.assert_array_equal(tensor.all(), x), file.tensors, params)
    kernel = file.tensors["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(
        kernel.read((slice(1, 2), slice(0, 4), slice(None))), params["layers"]["mlp"]["up"]["kernel"][1:2, :4]
    )


def test_a_run_whose_weights_are_others_is_refused(run):
    directory, params = run
    params[0] = params[0] | {"final_norm": {"scale": np.ones(5)}}
    with pytest.raises(UserError, match=r"final_norm/scale of shape \(5,\), but model.json says \(16,\)"):
        open_model(str(directory))
    params[0] = {name: part for name, part in params[0].items() if name != "embed"}
    with pytest.raises(UserError, match=r"embed/embedding of shape None"):
        open_model(str(directory))


@pytest.mark.parametrize("change", [{"layers": "two"}, {"layres": 2}, {"kv_heads": 3}])
def test_a_run_with_a_bad_model_json_is_refused(run, change):
    directory, _ = run
    (directory / "model.json").write_text(json.dumps(asdict(CONFIG) | change))
    with pytest.raises(UserError):
        open_model(str(directory))


def test_a_gguf_file_and_a_known_name_go_through_the_cache(tmp_path, monkeypatch):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(fetch, "cached_gguf", lambda path: GOLDEN / "gpt2" if path == gguf else None)
    monkeypatch.setattr(fetch, "ensure", lambda name: GOLDEN / "llama_tied" if name == "some/model" else None)
    assert open_model(str(gguf)).config.family == "gpt2"
    file = open_model("some/model")
    assert file.config.family == "llama" and file.source == "some/model"
    assert file.sha256() == open_model(str(GOLDEN / "llama_tied")).sha256()


def test_an_unknown_name_is_told_what_was_tried():
    with pytest.raises(
        UserError, match="no model 'smolm2-135m-instruct': no such directory.*did you mean 'smollm2-135m"
    ):
        open_model("smolm2-135m-instruct")


@pytest.mark.parametrize(
    ("name", "message"), [("w.bin", "pickled, which can run code"), ("w.txt", "wanted a directory")]
)
def test_a_file_is_no_model(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / name))
