"""All that can be wrong with a config's models, data and batch is said before the first step, in one line."""

import json
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file

from kdjax import config as configs
from kdjax.build import build
from kdjax.data import load_tokenizer
from kdjax.errors import UserError
from kdjax.job import Job
from kdjax.models import Model, ModelConfig, ModelSpec, export

SMALL = ModelConfig(vocab_size=264, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=32)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return configs.load(str(tiny_run.write_recipe(tmp_path_factory.mktemp("build"))))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model on disk, with the tokenizer of bytes."""
    home = tmp_path_factory.mktemp("exported")
    load_tokenizer("bytes").save(home / "tokenizer")
    params = Model(SMALL).init(jax.random.key(0))
    return export(SMALL, params, home / "model", home / "tokenizer" / "tokenizer.json")


@pytest.fixture(scope="module")
def base(exported, tmp_path_factory):
    """A model on disk for which it matters what stood before."""
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 2 or len(x) == 264 else x, Model(SMALL).init(jax.random.key(0)))
    return export(SMALL, params, tmp_path_factory.mktemp("base") / "model", exported / "tokenizer.json")


@pytest.fixture
def directory(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def taught_by(config, directory, **student):
    """The config with a model on disk as teacher, whose tokenizer it takes."""
    spec = ModelSpec(source=str(directory))
    student = replace(config.student, **student) if student else config.student
    return replace(config, teacher=spec, student=student, data=replace(config.data, tokenizer=""))


def refused(config, said):
    with pytest.raises(UserError, match=said) as caught:
        build(config)
    assert "\n" not in str(caught.value)


def test_it_builds(config, directory):
    job = build(taught_by(config, directory, source="teacher", keep_layers=(1,)))
    assert isinstance(job, Job)
    assert job.student.model.config.layers == 1
    assert job.student.name.endswith("model, layers 1")
    np.testing.assert_array_equal(
        job.start().params["student"]["layers"]["mlp"]["up"]["kernel"][0],
        job.frozen()["teacher"]["layers"]["mlp"]["up"]["kernel"][1],
    )


def test_random_student_and_teacher_differ(config):
    job = build(config)
    student, teacher = job.start().params["student"], job.frozen()["teacher"]
    assert not np.allclose(student["embed"]["embedding"], teacher["embed"]["embedding"])


def test_learning_rates_are_those_of_the_schedule(config):
    rates = build(replace(config, optim=replace(config.optim, schedule="constant", warmup_steps=1))).learning_rates
    np.testing.assert_allclose(rates, [1.5e-3, 3e-3, 3e-3, 3e-3], rtol=1e-6)


@pytest.mark.parametrize(("batch_size", "near"), [(15, "16"), (24, "16 or 32")])
def test_a_batch_that_does_not_split_names_the_nearest(config, batch_size, near):
    said = rf"batch_size {batch_size} does not split over 8 devices \(.*\) and 2 microbatches; use {near}$"
    refused(replace(config, batch_size=batch_size), said)


def test_models_of_two_vocabularies_are_refused(config):
    student = replace(config.student, architecture=replace(SMALL, vocab_size=300))
    refused(replace(config, student=student), "student's vocabulary has 300 but the teacher's 264 entries")


def test_a_tokenizer_that_does_not_fit_is_refused(config):
    small = replace(config.student, architecture=replace(SMALL, vocab_size=100))
    refused(replace(config, student=small, teacher=small), "tokenizer does not fit the model: it has ids up to 259")


def test_random_models_need_a_tokenizer(config):
    refused(replace(config, data=replace(config.data, tokenizer="")), "no model brings a tokenizer; set data.tokenizer")


def test_two_tokenizers_are_refused(config, directory, tmp_path):
    other = shutil.copytree(directory, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(taught_by(config, directory, source=str(other)), "different tokenizers")


@pytest.mark.parametrize("layers", [(0, 2), (-1,)])
def test_layers_that_are_not_there_are_refused(config, directory, layers):
    refused(
        taught_by(config, directory, source="teacher", keep_layers=layers),
        re.escape(f"layers {layers}") + ".*from 0 to 1",
    )


def test_layers_of_a_random_model_are_refused(config):
    refused(replace(config, student=replace(config.student, keep_layers=(0,))), "keep_layers .* source is 'random'")


def test_a_student_cut_from_a_random_teacher_is_refused(config):
    refused(
        replace(config, student=ModelSpec(source="teacher")), "the teacher is random; give the student an architecture"
    )


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_rows_longer_than_a_model_are_refused(config, who):
    spec = replace(config.student, architecture=replace(SMALL, max_positions=31))
    refused(
        replace(config, **{who: spec}), f"data.sequence_length is 32 but the {who} was made for 31 positions at most"
    )
    build(replace(config, student=replace(spec, architecture=replace(SMALL, max_positions=32))))


def cut(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    save_file(tensors, path)


def lose(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "model.safetensors is cut short"),
        (reshape, "model.norm.weight has shape"),
        (lose, "lacks 1 of the tensors"),
        (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda d: (d / "config.json").unlink(), "cannot read .*config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text('{"model_type": "mamba"}'), "mamba"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "config.json"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json is no readable tokenizer.json"),
    ],
)
def test_a_broken_model_is_refused(config, directory, damage, said):
    damage(directory)
    refused(taught_by(config, directory), said)


@pytest.mark.parametrize("source", ["nowhere", "no/such/place", "gone.gguf"])
def test_a_model_that_is_not_there_is_refused(config, source):
    refused(taught_by(config, source), source)


def of_text(config, path, data, **changes):
    path.write_bytes(data)
    return replace(config, data=replace(config.data, sources=(f"text:{path}",), **changes))


def test_an_empty_file_is_refused(config, tmp_path):
    refused(of_text(config, tmp_path / "empty.txt", b""), "data source 'text:.*empty.txt' is empty")
    refused(of_text(config, tmp_path / "blank.txt", b"\n \n\n"), "is empty")


def test_a_missing_file_is_refused(config):
    refused(replace(config, data=replace(config.data, sources=("text:gone.txt",))), "text:gone.txt names no file")


def test_text_that_is_not_utf8_is_refused_with_its_line(config, tmp_path):
    lines = [b"word " * 2000 + b"\n"] * 20
    lines[12] = b"na\xefve " * 1000 + b"\n"
    refused(of_text(config, tmp_path / "latin.txt", b"\n".join(lines)), r"latin.txt line 25: byte 0xef is not UTF-8")
