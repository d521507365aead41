"""How a process joins its job: what is refused before anything is computed."""

import jax
import pytest
import tiny_run

from kdjax.cli import main
from kdjax.distributed import Launch, join
from kdjax.errors import UserError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "host:1234"}, "wanted HOST:PORT of process 0, how many processes there are"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "coordinator 'host', processes 2, process 0; wanted"),
        ({"coordinator": "host:1234", "processes": 2, "process": 2}, "which one this is, from 0"),
        ({"processes": 2, "process": 1}, "coordinator '', processes 2, process 1; wanted HOST:PORT"),
        ({"auto": True, "process": 1}, "leave out one or the other"),
        ({"auto": True, "timeout": 0}, "timeout is 0 .*at least 1 second"),
        ({"processes": -1}, "processes -1; wanted"),
    ],
)
def test_a_launch_that_does_not_say_all_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        Launch(**given)


def test_single_jobs_that_a_launcher_takes_for_one_are_refused(tmp_path, capsys):
    """Two processes that know nothing of each other would train the same thing twice."""
    recipe = tiny_run.write_recipe(tmp_path)
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--distributed.processes", "2"]) == 2
    assert "--distributed.processes is 2, but this job has 1: each would train alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_that_has_joined_already_is_only_counted(monkeypatch):
    """As under a launcher that initialises jax itself."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    join(Launch(processes=4, auto=True))
    with pytest.raises(UserError, match="processes is 3, but this job has 4"):
        join(Launch(processes=3, auto=True))


def test_no_launcher_is_one_line(monkeypatch):
    def initialize(**how):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="distributed.auto knows no launcher here .coordinator_address should be"):
        join(Launch(auto=True))
