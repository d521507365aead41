"""A recipe, its flags and a config.json give the same config, or one line that says what is wrong."""

import dataclasses

import pytest
import tiny_run

from kdjax import config as configs
from kdjax.config import Config
from kdjax.data.chat import render
from kdjax.errors import UserError
from kdjax.fields import from_json, to_json
from kdjax.models import ModelSpec


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_run.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def config(recipe):
    return configs.load(str(recipe))


def flagged(config, *flags):
    return configs.override(config, flags, "kdjax train tiny.py")


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
    (tmp_path / "config.json").write_text(to_json(config))
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


def test_a_prompt_file_becomes_views_that_need_no_file(config, tmp_path):
    prompt = 'Say "Ahoy"!\n{{ not }} {% a template %} \\ é'
    (tmp_path / "mine.txt").write_text(f"\n{prompt}\n", "utf-8")
    got = configs.with_prompt(dataclasses.replace(config, prompt_file=str(tmp_path / "mine.txt")))
    assert got.prompt_file == "" and from_json(to_json(got), Config) == got
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
