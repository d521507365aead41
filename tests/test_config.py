"""A recipe, its flags and a config.json give the same config, or one line that says what is wrong."""

import dataclasses
import json

import pytest
import tiny_run

from kdjax import config as configs
from kdjax.config import Config
from kdjax.data.chat import render
from kdjax.errors import UserError
from kdjax.models import ModelSpec


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_run.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def config(recipe):
    return configs.load(str(recipe))


def flagged(config, *flags):
    return configs.override(config, flags, "kdjax train tiny.py")


def edited(config, path, value):
    """The config as JSON with the value at a dotted path replaced."""
    tree = json.loads(configs.to_json(config))
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[last] = value
    return json.dumps(tree)


def test_json_round_trips(config):
    assert configs.from_json(configs.to_json(config)) == config
    assert configs.from_json(configs.to_json(Config())) == Config()
    hash(configs.from_json(configs.to_json(config)))


def test_a_field_that_json_lacks_has_its_default():
    assert configs.from_json('{"steps": 7, "optim": {"b2": 1}}').optim.b2 == 1.0
    assert configs.from_json("{}") == Config()


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
        assert configs.from_json(text) != config
        return
    with pytest.raises(UserError, match=said):
        configs.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000])
def test_what_is_no_config_is_refused(text):
    with pytest.raises(UserError, match="is not JSON|wanted an object"):
        configs.from_json(text)


def test_a_student_cut_from_no_teacher_is_refused():
    with pytest.raises(UserError, match="the config has no teacher"):
        Config(student=ModelSpec(source="teacher"))
    with pytest.raises(UserError, match="teacher.source is 'teacher'"):
        Config(teacher=ModelSpec(source="teacher"))


def test_flags_override(config):
    changed = flagged(config, "--optim.learning-rate", "1e-4", "--student.keep_layers", "0", "2", "--steps=9")
    assert (changed.optim.learning_rate, changed.student.keep_layers, changed.steps) == (1e-4, (0, 2), 9)
    assert flagged(config, "--checkpoint.no-keep-best").checkpoint.keep_best is False
    assert flagged(config) == config


def test_flags_give_a_teacher_to_a_config_that_has_none(config):
    alone = dataclasses.replace(config, teacher=None)
    assert flagged(alone, "--teacher.source", "runs/x").teacher == ModelSpec(source="runs/x")
    assert flagged(alone, "--steps", "9").teacher is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stepz", "3"], r"^unknown flag --stepz; did you mean --steps\?$"),
        (["--optim.learning_rat=3"], r"^unknown flag --optim.learning_rat; did you mean --optim.learning-rate\?$"),
        (["--zzz"], "^unknown flag --zzz; --help lists all$"),
        (["--steps", "many"], "--steps: invalid literal for int.*'many'"),
        (["--steps"], "--steps"),
        (["--steps", "0"], "^steps is 0; wanted at least 1"),
        (["--optim.name", "adam"], "'adam' for argument '--optim.name'.*adamw"),
        (["--data.eval-fraction", "2"], "data.eval_fraction is 2.0"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_flag_is_one_line(config, flags, said):
    with pytest.raises(UserError, match=said) as caught:
        flagged(config, *flags)
    assert "\n" not in str(caught.value) and "─" not in str(caught.value)


def test_help_lists_every_field(config, capsys):
    with pytest.raises(SystemExit) as stop:
        flagged(config, "--help")
    assert not stop.value.code
    shown = capsys.readouterr().out
    for name in ("--steps INT", "--teacher.architecture.layers", "--data.sources", "--mesh.fsdp"):
        assert name in shown


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps=4", "stepz=4", r"tiny.py line \d+: .*'stepz'; did you mean 'steps'\?"),
        ("every=2", "evry=2", r"tiny.py line \d+: .*'evry'; did you mean 'every'\?"),
        ("steps=4", "steps=0", r"tiny.py line \d+: steps is 0; wanted at least 1"),
        ("steps=4", "steps=4.5", "tiny.py: steps is 4.5; wanted a whole number"),
        ("steps=4", "steps='4'", r"tiny.py line \d+: TypeError"),
        ('name="tiny"', "name=Path.cwd", "tiny.py: TypeError"),
        ('name="tiny"', "name=3", "tiny.py: name is 3; wanted text"),
        ("    small =", "    1 / 0\n    small =", r"tiny.py line 13: ZeroDivisionError: division by zero"),
        ("    small =", "    raise SystemExit(3)\n    small =", r"tiny.py line 13: SystemExit: 3"),
        ("import Config", "import Confik", r"tiny.py line 6: ImportError"),
        ("def get_config() -> Config:", "def get_config( -> Config:", "tiny.py: SyntaxError"),
        ("def get_config", "def config", r"tiny.py has no get_config\(\)"),
        ("return Config(", "return dict(", "returned dict; wanted a kdjax.config.Config"),
    ],
)
def test_a_recipe_that_does_not_run_is_one_line(tmp_path, old, new, said):
    assert old in tiny_run.RECIPE
    path = tiny_run.write_recipe(tmp_path, tiny_run.RECIPE.replace(old, new, 1))
    with pytest.raises(UserError, match=said) as caught:
        configs.load(str(path))
    assert "\n" not in str(caught.value)


def test_a_recipe_may_use_lists_and_paths(tmp_path, config):
    text = tiny_run.RECIPE.replace('("Read [bold]this[/bold].",)', '["Read [bold]this[/bold]."]')
    path = tiny_run.write_recipe(tmp_path, text.replace('name="tiny"', 'name=Path("tiny")'))
    loaded = configs.load(str(path))
    assert (loaded.notes, loaded.name) == (config.notes, "tiny")


def test_a_run_directory_is_read_by_its_config(tmp_path, config):
    (tmp_path / "config.json").write_text(configs.to_json(config))
    assert configs.load(str(tmp_path)) == config
    assert configs.load(str(tmp_path / "config.json")) == config


def test_a_config_that_is_not_there_names_the_nearest_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config at 'configs/smok.py': wanted a recipe"):
        configs.load("configs/smok.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.py").write_text("")
    with pytest.raises(UserError, match=r"did you mean 'configs/smoke.py'\?"):
        configs.load("configs/smok.py")
    assert configs.recipes() == ["configs/smoke.py"]


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        configs.load(str(tmp_path))


def test_differences_name_fields(config):
    other = dataclasses.replace(config, steps=5, teacher=None)
    lines = configs.differences(config, other)
    assert "steps: 4 -> 5" in lines
    assert any(line.startswith("teacher.source") for line in lines)
    assert configs.differences(config, config) == []


def test_a_prompt_file_becomes_views_that_need_no_file(config, tmp_path):
    prompt = 'Say "Ahoy"!\n{{ not }} {% a template %} \\ é'
    (tmp_path / "mine.txt").write_text(f"\n{prompt}\n", "utf-8")
    got = configs.with_prompt(dataclasses.replace(config, prompt_file=str(tmp_path / "mine.txt")))
    assert got.prompt_file == "" and configs.from_json(configs.to_json(got)) == got
    shown = []
    for view in (got.data.student_view, got.data.teacher_view):
        render(view, {"chat": shown.append, "prompt": "What?"}, strict=True)
    user = {"role": "user", "content": "What?"}
    assert shown == [[user], [{"role": "system", "content": prompt}, user]], shown
    assert configs.with_prompt(config) is config


@pytest.mark.parametrize(("text", "said"), [(None, "cannot be read"), (" \n", "is empty; write the prompt")])
def test_a_prompt_file_that_is_none_is_refused(config, tmp_path, text, said):
    if text is not None:
        (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(UserError, match=f"prompt_file .*mine.txt {said}"):
        configs.with_prompt(dataclasses.replace(config, prompt_file=str(tmp_path / "mine.txt")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher_follows": "average"}, "teacher_follows is 'average', but the student does not start as the teacher"),
        ({"average_decay": 1.0}, "average_decay is 1.0; wanted at least 0 and below 1"),
    ],
)
def test_a_teacher_that_cannot_follow_is_refused(config, change, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(config, **change)
