"""One job over several processes: the same losses as one process has, stopped together, continued by another number."""

import json
import pickle
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import test_step
import tiny_run
from tiny_run import home, last_step, rows  # noqa: F401 (home is a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LIMIT_SECONDS = 400
STEPS = 60
FLAGS = ("--steps", STEPS, "--checkpoint.every", 10, "--eval-every", 25)

KDJAX = [sys.executable, "-m", "kdjax"]

WORKER = """
import json, pickle, sys
tests, out, mesh, *arguments = sys.argv[1:]
from kdjax.arguments import add_launch
from kdjax.distributed import Launch, join
import argparse
parser = argparse.ArgumentParser()
add_launch(parser)
join(Launch(**vars(parser.parse_args(arguments))))
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
sys.path.insert(0, tests)
import test_step
found = test_step._run(json.loads(mesh), 1)
if jax.process_index() == 0:
    with open(out, "wb") as file:
        pickle.dump(found, file)
"""
"""Runs the five steps of tests/test_step.py on a mesh over all processes."""


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(stack, home, count, *arguments, command=KDJAX, devices=1):  # noqa: F811
    """Start a job of so many processes; whatever comes, all are gone when the stack ends.

    Each has one device, of a mesh: jax 0.10's gloo can deadlock with more.
    """
    job = ["--distributed.coordinator", free_address(), "--distributed.processes", str(count), "--distributed.process"]
    processes = [
        subprocess.Popen(
            [*command, *map(str, arguments), *job, str(index)],
            cwd=home,
            env=tiny_run.environment(home, JAX_NUM_CPU_DEVICES=str(devices)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    for process in processes:
        stack.callback(process.kill)
    return processes


def ended(processes):
    """Wait; return exit codes, and what was printed on both channels."""
    said = [process.communicate(timeout=LIMIT_SECONDS) for process in processes]
    return [process.returncode for process in processes], said


@pytest.fixture(scope="module")
def alone(home):  # noqa: F811
    got = tiny_run.run(home, "train", "tiny.py", "--run-dir", "alone", *FLAGS)
    assert got.returncode == 0, got.stderr
    return rows(home / "alone")


def assert_same(ours, theirs):
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-6, abs=1e-6)


def test_two_processes_train_as_one_does(home, alone):  # noqa: F811
    with ExitStack() as stack:
        codes, said = ended(start(stack, home, 2, "train", "tiny.py", "--run-dir", "two", *FLAGS))
    assert codes == [0, 0], said
    (out, _), (silent, _) = said
    own_words = [line for line in silent.splitlines() if not line.startswith("[Gloo]")]
    assert "student after" in out and not own_words
    assert_same(rows(home / "two"), alone)


def test_a_teacher_apart_speaks_to_the_students_devices_of_its_process(home, alone):  # noqa: F811
    """Of two processes with two devices each, one of them the teacher's."""
    arguments = ("train", "tiny.py", "--run-dir", "apart", *FLAGS, "--teacher-mesh.devices", 2)
    with ExitStack() as stack:
        codes, said = ended(start(stack, home, 2, *arguments, devices=2))
    assert codes == [0, 0], said
    assert_same(rows(home / "apart"), alone)


def test_a_job_goes_on_with_any_number_of_processes(home, alone):  # noqa: F811
    """Begun on two, stopped, gone on with four, stopped, ended by one: no example is lost or seen twice."""
    arguments, saved = ("train", "tiny.py", "--run-dir", "elastic", *FLAGS), 0
    for count, step in ((2, 15), (4, 35)):
        with ExitStack() as stack:
            processes = start(stack, home, count, *arguments)
            end = time.monotonic() + LIMIT_SECONDS
            while last_step(home / "elastic") < step and time.monotonic() < end and processes[0].poll() is None:
                time.sleep(0.005)
            processes[1].send_signal(signal.SIGTERM)
            codes, said = ended(processes)
        assert codes == [128 + signal.SIGTERM] * count, said
        assert saved == 0 or f"elastic goes on after step {saved}\n" in said[0][1]
        saved = last_step(home / "elastic")
        assert step <= saved < STEPS
        arguments = ("train", "elastic")
    got = tiny_run.run(home, "train", "elastic")
    assert got.returncode == 0, got.stderr
    assert got.stderr.startswith(f"kdjax: elastic goes on after step {saved}\n")
    assert_same(rows(home / "elastic"), alone)


def test_a_cache_of_two_processes_is_read_by_one_and_the_reverse(home, alone):  # noqa: F811
    """Both give the losses of a run whose teacher is live, but for what bfloat16 rounds off its hidden states."""
    kept = ("--label.kind", "hidden", "--label.shard-rows", 64, *FLAGS)
    with ExitStack() as stack:
        codes, said = ended(start(stack, home, 2, "label", "tiny.py", "of-two", *kept))
    assert codes == [0, 0], said
    assert len(list((home / "of-two").glob("train-*-of-002.array_record"))) == 2 * STEPS * 16 // 64
    for arguments in (("label", "tiny.py", "of-one", *kept), ("train", "tiny.py", "--cache", "of-two", *FLAGS[:2])):
        got = tiny_run.run(
            home, *arguments, *(("--run-dir", "read-by-one", *FLAGS[2:]) if "train" in arguments else ())
        )
        assert got.returncode == 0, got.stderr
    with ExitStack() as stack:
        reads = ("train", "tiny.py", "--cache", "of-one", "--run-dir", "read-by-two", *FLAGS)
        codes, said = ended(start(stack, home, 2, *reads))
    assert codes == [0, 0], said
    for run in ("read-by-one", "read-by-two"):
        for ours, theirs in zip(rows(home / run), alone, strict=True):
            assert ours["step"] == theirs["step"]
            for name in {"loss", "ce", "kd", "eval_kl"} & theirs.keys():
                assert ours[name] == pytest.approx(theirs[name], rel=5e-3, abs=1e-5), (run, name)


PROCESSES = {
    "context 2": (2, {"data": 1, "context": 2}),
    "fsdp 2, context 2": (4, {"data": 1, "fsdp": 2, "context": 2}),
}


@pytest.fixture(scope="module")
def one_device():
    return test_step._run(**test_step.ALONE)


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_give_the_gradients_of_one_device(home, one_device, name):  # noqa: F811
    """Five steps on one device each of 2 or 4 real processes; where two share examples, they read the same ones."""
    (count, mesh), out = PROCESSES[name], home / f"{name}.pickle"
    worker = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(out), json.dumps(mesh)]
    with ExitStack() as stack:
        codes, said = ended(start(stack, home, count, command=worker))
    assert codes == [0] * count, said
    test_step.agree(pickle.loads(out.read_bytes()), one_device)


def test_a_coordinator_that_does_not_answer_is_one_line(home):  # noqa: F811
    where = free_address()
    flags = ("--distributed.coordinator", where, "--distributed.processes", 2, "--distributed.timeout", 3)
    for process, wrong in (
        (1, f"no coordinator answered at {where} within 3 s"),
        (0, "not all processes came within 3 s"),
    ):
        got = tiny_run.run(home, "train", "tiny.py", "--run-dir", "nobody", *flags, "--distributed.process", process)
        assert got.returncode == 2 and got.stderr.startswith(f"kdjax: {wrong}"), got.stderr
        assert process == 0 or len(got.stderr.splitlines()) == 1  # jax's own coordinator has its say after ours
        assert not (home / "nobody").exists()
