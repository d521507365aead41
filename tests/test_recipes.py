"""Every recipe in configs/ is whole: it loads, its models and step fit together, and its head says what it is."""

import ast
import json
import re
from functools import partial
from pathlib import Path

import jax
import pytest

from kdjax import config as configs
from kdjax.config import Config
from kdjax.fields import from_json, to_json
from kdjax.models import LazyTensor, Model, ModelFile
from kdjax.models.known import known_architecture
from kdjax.pipeline import PipelineConfig
from kdjax.plan.abstract import abstract_batch, abstract_job
from kdjax.prompts.config import EffectConfig, PromptsConfig
from kdjax.step import init_state, step

ROOT = Path(__file__).parents[1]
OTHERS = {
    "effect": ("effect", EffectConfig),
    "prompt_search": ("prompts", PromptsConfig),
    "prompt_generation": ("prompts", PromptsConfig),
    "prompt_question_answering": ("prompts", PromptsConfig),
    "prompt_summarising": ("prompts", PromptsConfig),
    "prompt_pipeline": ("pipeline", PipelineConfig),
}
"""Recipes of other commands than train: name -> command, kind of config."""
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in OTHERS)
FIELDS = ("COMMAND", "HARDWARE", "TIME", "RESULT")


def shape_of(source):
    """The architecture of what a recipe names."""
    if source.startswith("runs/"):
        return configs.load(str(ROOT / "configs" / f"{Path(source).name}.py")).student.architecture
    return known_architecture(source)


def unread(source):
    """A model of the named one's shape that cannot be read."""
    shape = shape_of(source)

    def refuse(index):
        raise AssertionError("a weight was read")

    shapes = jax.eval_shape(Model(shape).init, jax.random.key(0))
    return ModelFile(shape, jax.tree.map(lambda x: LazyTensor(x.shape, refuse), shapes), source, None)


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


def test_there_are_recipes():
    assert {"quickstart", "smoke", "pretrain_tiny"} <= {path.stem for path in RECIPES}


def check_head(path, command):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    fields = dict(re.findall(r"^([A-Z]+): +(\S.*)$", doc, re.MULTILINE))
    assert tuple(fields)[:4] == FIELDS
    assert fields["COMMAND"] == f"kdjax {command} {path.relative_to(ROOT)}"


def test_its_head_says_what_it_is(recipe):
    check_head(recipe, "train")


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_of_another_command_says_what_it_is_and_round_trips(name):
    command, kind = OTHERS[name]
    path = ROOT / "configs" / f"{name}.py"
    check_head(path, command)
    config = configs.load(str(path), kind)
    assert from_json(to_json(config), kind) == config and config.name == name


def test_its_json_round_trips(recipe):
    config = configs.load(str(recipe))
    assert from_json(to_json(config), Config) == config
    assert json.loads(to_json(config))["name"] == config.name == recipe.stem


def test_its_step_fits_together(recipe):
    config = configs.load(str(recipe))
    job = abstract_job(config, jax.devices()[:1], unread)
    place, parts, student, teacher = job.place, job.recipe, job.student, job.teacher
    batch = abstract_batch(job)
    state = jax.eval_shape(lambda key: init_state(parts, student.init(key)), jax.random.key(0))
    frozen = {} if teacher is None else {"teacher": jax.eval_shape(teacher.model.init, jax.random.key(0))}
    if not student.is_whole:
        frozen["student"] = student.base(place, jax.eval_shape(student.model.init, jax.random.key(0)))
    after, metrics = jax.eval_shape(partial(step, recipe=parts), state, frozen, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    assert ("kd" in metrics) == (teacher is not None and config.objective.logits)
