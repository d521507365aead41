"""Other engines: when they are said to do the same job, and that they take the same step as processes of their own."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import harness, peers

ROOT = Path(__file__).parents[1]


def told(engine, seconds, loss):
    """A row of benchmarks.peers, of an engine whose steps all took so long."""
    running = SimpleNamespace(told=[{"versions": {engine: "1.0"}}, {}, {"loss": loss, "grad_norm": 2.0}])
    running.first = partial(peers.Running.first, running)
    trials = {engine: {n: harness.Trial(seconds, None) for n in range(4)}}
    made = peers.row(peers.shape(), engine, running, None, trials), running
    return made[0] | {"ratio": None, "floor_seconds": 1.0, "peak_bytes": 3_000_000_000}, running, trials


def test_an_engine_that_is_further_off_is_said_not_to_do_the_same_job():
    ours, running, _ = told("kdjax", 2.0, 0.5)
    assert ours["tokens_per_second"] == 512 and ours["weighted_tokens_per_second"] == 510
    rows = [ours | {"environment": {"device": "cpu", "platform": "cpu", "python": "3", "jax": "1", "commit": "abc"}}]
    for engine, loss in (("near", 0.5004), ("far", 0.502)):
        other, theirs, trials = told(engine, 4.0, loss)
        found = peers.row(peers.shape(), engine, theirs, running, trials)
        assert found["same_job"] is (engine == "near") and found["grad_norm_error"] == 0
        rows.append(rows[0] | other | found | {"ratio": 2.0})
    first, *_, near, far = [line for line in peers.markdown(rows).splitlines() if "1.0)" in line]
    assert first.startswith("| kdjax (kdjax 1.0) | 512.0 (512.0 to 512.0) | 510.0 | – | 2.00 × | 3.00 GB | –")
    assert "| 2.00 × | 4.00 × | 3.00 GB | 8e-04, 0e+00 |" in near and "not the same job: 4e-03" in far
    elsewhere = [row | {"environment": row["environment"] | {"cpu_model": "another"}} for row in rows]
    assert peers.markdown([*rows, *elsewhere]).count("| kdjax (kdjax 1.0) |") == 2, "each machine has a table"
    assert peers.markdown([*rows, *rows]).count("| kdjax (kdjax 1.0) |") == 1, "the newest of each engine"


@pytest.mark.slow
def test_engines_take_the_same_step_in_processes_of_their_own(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    kept = tmp_path / "peers.jsonl"
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--results", str(kept), "--engines", "kdjax"]

    def run(*more):
        return subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, timeout=400)

    done = run("torch plain", "Tunix")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"kdjax", "torch plain"} <= set(found) and found["kdjax"]["ratio"] == 1 and not kept.exists()
    assert "not the same job" not in done.stderr and found["torch plain"]["tokens_per_second"] > 0
    assert "Tunix" in found or "Tunix: does not run here" in done.stderr and "google-tunix" in done.stderr
    wrong = run("--python", f"Tunix={tmp_path}/none")
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
