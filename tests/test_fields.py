"""A config is the same after it was saved, and what is no config is refused by the name of its field."""

import dataclasses
import json

import pytest
import tiny_run

from kdjax import config as configs
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.fields import differences, from_json, to_json


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return configs.load(str(tiny_run.write_recipe(tmp_path_factory.mktemp("recipe"))))


def edited(config, path, value):
    """The config as JSON with the value at a dotted path replaced."""
    tree = json.loads(to_json(config))
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[last] = value
    return json.dumps(tree)


def test_json_round_trips(config):
    assert from_json(to_json(config), Config) == config
    assert from_json(to_json(Config()), Config) == Config()
    hash(from_json(to_json(config), Config))


def test_a_field_that_json_lacks_has_its_default():
    assert from_json('{"steps": 7, "optim": {"b2": 1}}', Config).optim.b2 == 1.0
    assert from_json("{}", Config) == Config()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("stepz", 3, "unknown field 'stepz'; did you mean 'steps'?"),
        ("optim.learning_rat", 3, "unknown field 'optim.learning_rat'; did you mean 'learning_rate'?"),
        ("steps", "3", "steps is '3'; wanted a whole number"),
        ("steps", 3.5, "steps is 3.5; wanted a whole number"),
        ("steps", True, "steps is True; wanted a whole number"),
        ("steps", None, "steps is None; wanted a whole number"),
        ("steps", 0, "steps is 0; wanted at least 1"),
        ("prompt_tokens", 0, "prompt_tokens is 0; wanted at least 1"),
        ("seed", 2**32, r"seed is 4294967296; wanted below 2\*\*32"),
        ("optim.learning_rate", "1e-3", "optim.learning_rate is '1e-3'; wanted a number"),
        ("optim.name", "adam", "optim.name is 'adam'; wanted one of adamw, adafactor, lion, muon"),
        ("checkpoint.keep_best", 1, "checkpoint.keep_best is 1; wanted true or false"),
        ("data.sources", "python_docs", "data.sources is 'python_docs'; wanted a list"),
        ("student.keep_layers", [0, "1"], "student.keep_layers is '1'; wanted a whole number"),
        ("teacher", 3, "teacher is 3; wanted an object"),
        ("optim", None, "optim is None; wanted an object"),
        ("student.source", "teacher", None),
        ("teacher", None, None),
    ],
)
def test_json_is_checked_field_by_field(config, path, value, said):
    text = edited(config, path, value)
    if said is None:
        assert from_json(text, Config) != config
        return
    with pytest.raises(UserError, match=said):
        from_json(text, Config)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000])
def test_what_is_no_config_is_refused(text):
    with pytest.raises(UserError, match="is not JSON|wanted an object"):
        from_json(text, Config)


def test_differences_name_fields(config):
    other = dataclasses.replace(config, steps=5, teacher=None)
    lines = differences(config, other)
    assert "steps: 4 -> 5" in lines
    assert any(line.startswith("teacher.source") for line in lines)
    assert differences(config, config) == []
