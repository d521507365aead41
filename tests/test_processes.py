"""One job over several processes: the same losses as one process has, stopped together, continued by another number."""

import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import tiny_run
from tiny_run import home, last_step, rows  # noqa: F401 (home is a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LIMIT_SECONDS = 400
STEPS = 60
FLAGS = ("--steps", STEPS, "--checkpoint.every", 10, "--eval-every", 25)

# One device a process: jax 0.10's gloo can deadlock with more.
WORKER = """
import sys, jax
address, count, index, *arguments = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(address, int(count), int(index))
from kdjax.cli import main
sys.exit(main(arguments))
"""


def start(stack, home, count, *arguments):  # noqa: F811
    """Start a job of so many processes; whatever comes, all are gone when the stack ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(count), str(index), *map(str, arguments)],
            cwd=home,
            env=tiny_run.environment(home),
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


def test_a_job_stopped_on_two_processes_goes_on_with_one(home, alone):  # noqa: F811
    with ExitStack() as stack:
        processes = start(stack, home, 2, "train", "tiny.py", "--run-dir", "fewer", *FLAGS)
        end = time.monotonic() + LIMIT_SECONDS
        while last_step(home / "fewer") < 15 and time.monotonic() < end and processes[0].poll() is None:
            time.sleep(0.005)
        processes[1].send_signal(signal.SIGTERM)
        codes, said = ended(processes)
    assert codes == [128 + signal.SIGTERM] * 2, said
    stopped_at = last_step(home / "fewer")
    assert 15 <= stopped_at < STEPS
    got = tiny_run.run(home, "train", "fewer")
    assert got.returncode == 0, got.stderr
    assert got.stderr.startswith(f"kdjax: fewer goes on after step {stopped_at}\n")
    assert_same(rows(home / "fewer"), alone)
