"""Means, throughput, and the writers of metrics."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from kdjax import metrics
from kdjax.errors import UserError
from kdjax.metrics import JsonlWriter, TensorBoardWriter, Throughput, cut_back, means, open_writers, read


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def test_perplexity_is_of_the_whole_split_not_a_mean_of_means():
    """Trap 21: 10 tokens at 5 nats and 990 at 1 nat are 1.04 nats a token; a mean of means says 3."""
    sums = [(10 * 5.0, 10), (990 * 1.0, 990)]
    got = means({"ce": (sum(s for s, _ in sums), sum(n for _, n in sums))})
    assert got == {"ce": pytest.approx(1.04), "perplexity": pytest.approx(math.exp(1.04))}


def test_means_of_arrays_empty_weights_and_overflow():
    got = means({"teacher_ce": (jnp.float32(6.0), jnp.int32(3)), "kl": (np.float32(0), 0), "ce": (1e6, 1)})
    assert got["teacher_perplexity"] == pytest.approx(math.exp(2))
    assert math.isnan(got["kl"]) and got["perplexity"] == math.inf
    assert set(got) == {"teacher_ce", "teacher_perplexity", "kl", "ce", "perplexity"}


def test_throughput_leaves_out_the_first_step_and_slides():
    clock = Clock()
    throughput = Throughput(window=2, clock=clock)
    clock.now = 100.0  # compiling
    assert math.isnan(throughput.tick(1000)) and math.isnan(throughput.eta(5))
    clock.now += 2
    assert throughput.tick(1000) == 500 and throughput.eta(5) == 10
    clock.now += 1
    assert throughput.tick(1000) == pytest.approx(2000 / 3)
    clock.now += 1
    assert throughput.tick(1000) == 1000 and throughput.eta(5) == 5


def test_throughput_leaves_out_pauses_even_of_a_failure():
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.tick(10)
    with pytest.raises(KeyError), throughput.paused():
        clock.now += 60
        raise KeyError
    clock.now += 2
    assert throughput.tick(10) == 5


def written(path, rows):
    writer = JsonlWriter(path)
    for step, row in rows:
        writer.write(step, row)
    writer.close()
    return path


def test_rows_are_strict_json_and_null_reads_as_nan(tmp_path):
    row = {"loss": jnp.float32(1.5), "skipped": np.int32(2), "ce": math.nan, "kd": math.inf, "note": "x", "good": True}
    path = written(tmp_path / "metrics.jsonl", [(np.int64(3), row)])

    def refuse(name):
        raise AssertionError(name)

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"step": 3, "loss": 1.5, "skipped": 2, "ce": None, "kd": None, "note": "x", "good": True}
    (back,) = read(path)
    assert math.isnan(back["ce"]) and back["loss"] == 1.5


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=50)
def test_floats_come_back_bit_equal(tmp_path_factory, value):
    path = written(tmp_path_factory.mktemp("m") / "m.jsonl", [(1, {"loss": value})])
    assert struct.pack("d", read(path)[0]["loss"]) == struct.pack("d", value)


def test_a_kill_loses_no_written_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, pathlib, signal, sys\n"
        "from kdjax.metrics import JsonlWriter\n"
        "writer = JsonlWriter(pathlib.Path(sys.argv[1]))\n"
        "for step in range(1, 6): writer.write(step, {'loss': 1.0 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(metrics.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4, 5]


def test_a_file_torn_at_any_byte_reads_as_its_whole_rows_and_is_cut_back(tmp_path):
    whole = written(tmp_path / "whole", [(step, {"loss": step / 7}) for step in range(4)]).read_bytes()
    torn = tmp_path / "torn"
    for size in range(len(whole) + 1):
        torn.write_bytes(whole[:size])
        rows = read(torn)
        assert rows == [{"step": step, "loss": step / 7} for step in range(len(rows))]
        assert len(rows) >= whole[:size].count(b"\n")
        cut_back(torn, 1)
        assert torn.read_bytes() == b"".join(whole.splitlines(keepends=True)[: min(2, len(rows))])


def test_resume_continues_the_file_as_if_never_killed(tmp_path):
    rows = [(step, {"loss": 1 / (step + 1)}) for step in range(1, 10)]
    whole = written(tmp_path / "whole", rows).read_bytes()
    part = written(tmp_path / "part", rows[:7])
    part.write_bytes(part.read_bytes() + b'{"step": 8, "lo')
    cut_back(part, 5)
    assert written(part, rows[5:]).read_bytes() == whole


def test_cut_back_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = written(tmp_path / "m", [(1, {}), (2, {})])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(metrics.os, "replace", fail)
    with pytest.raises(OSError):
        cut_back(path, 1)
    assert path.read_bytes() == before


def test_no_file_is_no_rows(tmp_path):
    cut_back(tmp_path / "none", 3)
    assert read(tmp_path / "none") == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [b"{broken", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b"\xff\x00", b""])
def test_a_damaged_inner_line_is_named(tmp_path, line):
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    for act in (read, lambda path: cut_back(path, 2)):
        with pytest.raises(UserError, match="line 2 is damaged"):
            act(path)


def events(directory):
    """Return (step, {tag: value}) of each event, in order of writing."""
    found = []
    for path in sorted(directory.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}, event))
            data = data[16 + size :]
    return found


def test_tensorboard_events_have_groups_and_a_resumed_run_purges(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(4, {"loss": 2.0, "ce": math.nan, "note": "text"})
    writer.write(4, {"eval_kl": 0.5})
    writer.close()
    scalars = [(step, tags) for step, tags, _ in events(tmp_path) if tags]
    assert scalars == [(4, {"train/loss": 2.0}), (4, {"eval/kl": 0.5})]
    TensorBoardWriter(tmp_path, start=3).close()
    assert [step for step, _, event in events(tmp_path) if event.HasField("session_log")] == [4]


def test_only_an_enabled_process_writes(tmp_path):
    written(tmp_path / metrics.METRICS, [(1, {}), (2, {})])
    before = sorted((path, path.read_bytes()) for path in tmp_path.iterdir())
    assert open_writers(tmp_path, 10, lambda n: n, start=1, enabled=False) == []
    assert sorted((path, path.read_bytes()) for path in tmp_path.iterdir()) == before


def test_open_writers_cut_back_then_write_everywhere(tmp_path, capsys):
    written(tmp_path / metrics.METRICS, [(1, {"loss": 3.0}), (2, {"loss": 2.0})])
    writers = open_writers(tmp_path, 2, lambda n: n, start=1)
    for writer in writers:
        writer.write(2, {"loss": 2.5})
        writer.close()
    assert read(tmp_path / metrics.METRICS) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
    assert [tags for _, tags, _ in events(tmp_path / "tensorboard") if tags] == [{"train/loss": 2.5}]
    assert "loss 2.500" in capsys.readouterr().out


def test_a_run_that_was_never_saved_starts_afresh(tmp_path):
    written(tmp_path / metrics.METRICS, [(0, {"eval_kl": 3.0}), (1, {"loss": 2.0})])
    for writer in open_writers(tmp_path, 2, lambda n: n):
        writer.close()
    assert read(tmp_path / metrics.METRICS) == []


def test_without_tensorboard_the_other_writers_remain(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    writers = open_writers(tmp_path, 2, lambda n: n)
    assert [type(writer).__name__ for writer in writers] == ["JsonlWriter", "Progress"]
    for writer in writers:
        writer.close()
