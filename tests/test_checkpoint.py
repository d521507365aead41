"""What is saved comes back bit for bit, or not at all."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax import manifest
from kdjax.checkpoint import CheckpointConfig, Checkpoints, open_params
from kdjax.errors import UserError
from kdjax.lock import lock_run

ROOT = Path(__file__).parent.parent
ITERATOR = {"shards": {"0": {"next": 7, "bins": [1, 2.5, None]}, "1": {"next": 9}}, "epoch": 0}
CONFIG = json.dumps({"name": "smoke", "text": "ü\n"}, indent=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    slow: Any = None


def make_mesh(data, fsdp):
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def place(tree, mesh):
    def spec(leaf):
        return NamedSharding(mesh, PartitionSpec(*("data", "fsdp")[: leaf.ndim] if leaf.ndim == 2 else ()))

    return jax.tree.map(lambda leaf: jax.device_put(leaf, spec(leaf)), tree)


def make_state(step, mesh=None, width=8):
    """A state whose every leaf depends on the step, with the node types of real optimisers."""
    kernel = jnp.arange(width * width, dtype=jnp.float32).reshape(width, width) + step
    odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45, step], jnp.float32)
    params = {
        "student": {"embed": {"embedding": kernel}, "norm": {"scale": odd}, "half": kernel.astype(jnp.bfloat16)},
        "projections": {"kernel": kernel * 2},
    }
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"a": optax.adamw(1e-3), "b": optax.identity()}, {"student": "a", "projections": "b"}),
        optax.MultiSteps(optax.lion(1e-3), 2).gradient_transformation(),
    )
    opt_state = jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), optimiser.init(params))
    return place(State(jnp.int32(step), params, opt_state, jnp.array([True, False])), mesh or make_mesh(4, 2))


def abstract(state, mesh=None):
    wanted = place(state, mesh) if mesh else state
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), wanted)


def assert_bit_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def open_checkpoints(directory, frozen=None, **config):
    return Checkpoints(directory, CheckpointConfig(**config), frozen)


def save_steps(directory, steps, metrics=None, **config):
    with open_checkpoints(directory, **config) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), ITERATOR, CONFIG, (metrics or {}).get(step))


def restore(directory, state=None, frozen=None):
    with open_checkpoints(directory, frozen) as checkpoints:
        return checkpoints.restore(abstract(make_state(0) if state is None else state))


def step_names(directory):
    return sorted(path.name for path in directory.iterdir())


def largest_file(step_dir):
    return max((path for path in step_dir.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def test_state_iterator_and_config_come_back_bit_for_bit(tmp_path, capfd):
    save_steps(tmp_path, [3])
    restored = restore(tmp_path)
    assert restored is not None and restored.step == 3
    assert_bit_equal(restored.state, make_state(3))
    assert (restored.iterator_state, restored.config_json) == (ITERATOR, CONFIG)
    assert capfd.readouterr() == ("", "")


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "new") is None


def test_restores_onto_other_meshes(tmp_path):
    one = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    for step, (saved, wanted) in enumerate([((4, 2), make_mesh(2, 4)), ((2, 4), one), (None, make_mesh(1, 8))], 1):
        with open_checkpoints(tmp_path) as checkpoints:
            checkpoints.save(step, make_state(step, make_mesh(*saved) if saved else one), ITERATOR, CONFIG)
            restored = checkpoints.restore(abstract(make_state(step), wanted))
        assert_bit_equal(restored.state, make_state(step))
        assert restored.state.params["student"]["embed"]["embedding"].sharding.mesh == wanted


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), state), donate_argnums=0)
    state = place({"w": jnp.zeros((512, 512)), "n": jnp.int32(0)}, make_mesh(4, 2))
    with open_checkpoints(tmp_path) as checkpoints:
        for step in range(1, 6):
            state = advance(state)
            checkpoints.save(step, state, ITERATOR, CONFIG)
            wanted = abstract(state)
            for _ in range(4):
                state = advance(state)
        restored = checkpoints.restore(wanted)
    assert set(np.unique(restored.state["w"])) == {21} and restored.state["n"] == 21


def test_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    go, seal = threading.Event(), manifest.seal
    monkeypatch.setattr(manifest, "seal", lambda *args: go.wait() and seal(*args))
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), ITERATOR, CONFIG)
        checkpoints.check()
        assert not (tmp_path / "1").exists()
        go.set()
        checkpoints.wait()
        assert (tmp_path / "1").exists()


DAMAGE = {
    "flipped byte": (lambda step: flip(largest_file(step)), "differs from its SHA-256"),
    "truncated": (lambda step: os.truncate(largest_file(step), 10), "differs from its SHA-256"),
    "missing file": (lambda step: (step / "run" / "metadata").unlink(), "run/metadata is missing"),
    "missing manifest": (lambda step: (step / "manifest.json").unlink(), "manifest.json is missing"),
    "truncated manifest": (lambda step: os.truncate(step / "manifest.json", 10), "manifest.json is unreadable"),
    "flipped digit": (
        lambda step: (step / "manifest.json").write_text(
            (step / "manifest.json").read_text().replace('"metric": 0.5', '"metric": 0.1')
        ),
        "manifest.json differs",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_step_is_named_and_the_older_one_taken(tmp_path, caplog, kind):
    damage, message = DAMAGE[kind]
    save_steps(tmp_path, [80, 120], {120: 0.5})
    damage(tmp_path / "120")
    restored = restore(tmp_path)
    assert restored.step == 80
    assert_bit_equal(restored.state, make_state(80))
    (line,) = caplog.messages
    assert "step 120" in line and message in line and "\n" not in line
    assert step_names(tmp_path) == ["120.damaged", "80"]
    with open_checkpoints(tmp_path) as checkpoints:
        again = checkpoints.restore(abstract(make_state(0)))
        checkpoints.save(100, again.state, ITERATOR, CONFIG)
        checkpoints.save(120, make_state(120), ITERATOR, CONFIG)
    assert_bit_equal(restore(tmp_path).state, make_state(120))


def test_a_flipped_byte_in_any_file_is_found(tmp_path):
    save_steps(tmp_path, [1])
    manifest.verify(tmp_path / "1")
    names = manifest.read(tmp_path / "1").files
    assert len(names) > 5 and {"run/metadata", "state/_METADATA"} < set(names)
    for name in [name for name in names if (tmp_path / "1" / name).stat().st_size]:
        flip(tmp_path / "1" / name, at=-1)
        with pytest.raises(manifest.Damaged, match=f"^{name} differs"):
            manifest.verify(tmp_path / "1")
        flip(tmp_path / "1" / name, at=-1)
    manifest.verify(tmp_path / "1")


def test_no_whole_step_is_refused_and_left_alone(tmp_path):
    save_steps(tmp_path, [80, 120])
    (tmp_path / "80" / "manifest.json").unlink()
    flip(largest_file(tmp_path / "120"))
    with pytest.raises(UserError, match=r"no whole step in .*step 120: .* differs .*step 80: manifest.json is missing"):
        restore(tmp_path)
    assert step_names(tmp_path) == ["120", "80"]


def test_empty_directory_is_no_step(tmp_path, caplog):
    (tmp_path / "5").mkdir()
    assert restore(tmp_path) is None
    save_steps(tmp_path, [2])
    assert restore(tmp_path).step == 2 and not caplog.messages
    save_steps(tmp_path, [5])
    assert restore(tmp_path).step == 5


def test_what_a_killed_save_left_is_removed(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "2").rename(tmp_path / "2.unsealed")
    (tmp_path / "3.unsealed.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert restore(tmp_path).step == 1
    assert step_names(tmp_path) == ["1"]


def change(state, **params):
    student = {name: leaf for name, leaf in (state.params["student"] | params).items() if leaf is not None}
    return dataclasses.replace(state, params=state.params | {"student": student})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"half": jnp.zeros((8, 8))},
            r"^params/student/half is bfloat16\[8,8\] in step 1 but float32\[8,8\] is wanted",
        ),
        ({"norm": {"scale": jnp.zeros(6)}}, r"params/student/norm/scale is float32\[5\] in step 1 but float32\[6\]"),
        ({"half": None}, "params/student/half is in step 1 but not wanted"),
        ({"more": jnp.zeros(2)}, "params/student/more is wanted but not in step 1"),
    ],
)
def test_another_dtype_shape_or_leaf_is_refused(tmp_path, changes, message):
    save_steps(tmp_path, [1])
    mesh = make_mesh(4, 2)
    with pytest.raises(UserError, match=message):
        restore(tmp_path, change(make_state(0), **{k: v if v is None else place(v, mesh) for k, v in changes.items()}))


def test_frozen_trees_are_compared_by_hash(tmp_path):
    a, b = 64 * "a", 64 * "b"
    with open_checkpoints(tmp_path, {"teacher": f"models/t {a}", "base": "random seed 1"}) as checkpoints:
        checkpoints.save(1, make_state(1), ITERATOR, CONFIG)
    assert restore(tmp_path, frozen={"teacher": f"moved to/t {a}", "base": "random seed 1"}).step == 1
    with pytest.raises(UserError, match=f"^teacher is models/t {a} in step 1 but models/t {b} is wanted"):
        restore(tmp_path, frozen={"teacher": f"models/t {b}", "base": "random seed 1"})
    with pytest.raises(UserError, match="^base is random seed 1 in step 1 but other seed 1 is wanted"):
        restore(tmp_path, frozen={"teacher": f"models/t {a}", "base": "other seed 1"})
    with pytest.raises(UserError, match="^teacher is in step 1 but not wanted; base is in step 1 but not wanted"):
        restore(tmp_path)


def test_newest_and_best_are_kept(tmp_path):
    metrics = {1: float("nan"), 2: 1.0, 3: 3.0, 5: 2.0}
    save_steps(tmp_path, range(1, 7), metrics, keep=2)
    assert step_names(tmp_path) == ["2", "5", "6"]
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best_step() == 2
        checkpoints.restore(abstract(make_state(0)))
        checkpoints.save(7, make_state(7), ITERATOR, CONFIG, 0.5)
    assert step_names(tmp_path) == ["7"]
    save_steps(tmp_path, [8, 9], keep=1, keep_best=False)
    assert step_names(tmp_path) == ["9"]


def test_a_step_older_than_the_saved_ones_is_refused(tmp_path):
    save_steps(tmp_path, [5])
    for step in (3, 5):
        with pytest.raises(UserError, match=f"step {step} cannot be saved in .*, which holds step 5"):
            save_steps(tmp_path, [step])
    assert_bit_equal(restore(tmp_path).state, make_state(5))


def test_a_saved_step_may_get_its_metric_later(tmp_path):
    save_steps(tmp_path, [1], {1: 2.0})
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(2), ITERATOR, CONFIG)
        checkpoints.save(2, make_state(2), ITERATOR, CONFIG, 1.0)
        assert checkpoints.best_step() == 2
    assert restore(tmp_path).step == 2


FULL_DISK = """
import resource, signal, sys, time
from pathlib import Path

import jax, jax.numpy as jnp

from kdjax.checkpoint import CheckpointConfig, Checkpoints
from kdjax.errors import UserError

directory, checks = Path(sys.argv[1]), sys.argv[2] == "check"
checkpoints = Checkpoints(directory, CheckpointConfig())
state = {"w": jnp.ones((512, 512))}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    with checkpoints:
        checkpoints.save(1, state, {}, "{}")
        for _ in range(3000 if checks else 0):  # until the background has failed
            checkpoints.check()
            time.sleep(0.01)
        print("left the block" if not checks else "no check has failed")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("when", ["check", "exit"])
def test_failed_save_is_raised(tmp_path, when):
    """Every write past 20 kB fails, as on a full disk; in a process of its own, since that goes for all its files."""
    got = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "checkpoints", when],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = got.stdout.splitlines()
    assert "step 1 was not saved in " in said[-1] and "mend that and run the same command again" in said[-1]
    assert said[:-1] == ([] if when == "check" else ["left the block"])
    assert (got.returncode, got.stderr) == (0, "")
    assert manifest.step_numbers(tmp_path / "checkpoints") == []


def test_older_steps_are_deleted_only_once_the_new_one_is_sealed(tmp_path, monkeypatch):
    save_steps(tmp_path, [1], keep=1)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "seal", fail)
        with pytest.raises(UserError, match="step 2 was not saved .*No space left on device"):
            save_steps(tmp_path, [2], keep=1)
    assert restore(tmp_path).step == 1
    save_steps(tmp_path, [2], keep=1)
    assert restore(tmp_path).step == 2


def test_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints cannot be kept in"):
        open_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["every", "keep"])
def test_config_is_refused(name):
    with pytest.raises(UserError, match=f"checkpoint {name} is 0; wanted 1 or more"):
        CheckpointConfig(**{name: 0})


def test_open_params_takes_the_best_then_the_newest_whole_step(tmp_path, caplog):
    with pytest.raises(UserError, match="has no saved step"):
        open_params(tmp_path)
    saved = tmp_path / "checkpoints"
    save_steps(saved, [1, 2, 3], keep=3)
    newest = open_params(tmp_path)
    assert newest.step == 3
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(newest.params))
    assert_bit_equal(newest.params, make_state(3).params["student"])

    manifest.set_metric(saved / "1", 0.5)
    best = open_params(tmp_path)
    assert best.step == 1 and best.sha256 != newest.sha256
    assert open_params(tmp_path, 3).sha256 == newest.sha256
    with pytest.raises(UserError, match="no saved step 7; it has 1, 2, 3"):
        open_params(tmp_path, 7)

    flip(largest_file(saved / "1"))
    assert open_params(tmp_path).step == 3
    assert "step 1 " in caplog.text and "differs" in caplog.text
    with pytest.raises(UserError, match="no whole step .*step 1: .*differs"):
        open_params(tmp_path, 1)
    assert step_names(saved) == ["1", "2", "3"]


def start(code, *args, **popen):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT, **popen)


LOCK = """
import sys, time
from kdjax.lock import lock_run
with lock_run(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(120)
"""


def test_a_run_directory_is_for_one_job_even_after_a_kill(tmp_path):
    with start(LOCK, tmp_path) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
                with lock_run(tmp_path):
                    pass
        finally:
            process.kill()
    with lock_run(tmp_path):
        pass


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import conftest
from test_checkpoint import CONFIG, abstract, make_wide_state, open_checkpoints
with open_checkpoints(Path(sys.argv[1])) as checkpoints:
    restored = checkpoints.restore(abstract(make_wide_state(0)))
    step = restored.step if restored else 0
    while True:
        step += 1
        checkpoints.save(step, make_wide_state(step), {"shards": {"0": step}}, CONFIG, 1 / step)
        print("saving", flush=True)
"""


def make_wide_state(step):
    return make_state(step, width=256)


def kill_while_saving(directory, saves, after_s):
    """Save step after step in another process and kill it in the midst of the last; return the step that is left."""
    with start(SAVE_FOR_EVER, directory) as process:
        try:
            assert [process.stdout.readline() for _ in range(saves)] == ["saving\n"] * saves
            time.sleep(after_s)
        finally:
            process.kill()
        assert process.wait(60) == -signal.SIGKILL
    restored = restore(directory, make_wide_state(0))
    if restored is None:
        return 0
    assert restored.iterator_state == {"shards": {"0": restored.step}}
    assert_bit_equal(restored.state, make_wide_state(restored.step))
    assert not [name for name in step_names(directory) if not name.isdecimal()]
    return restored.step


def test_kill_in_mid_save_leaves_only_whole_steps(tmp_path):
    first = kill_while_saving(tmp_path, 3, 0.02)
    assert first >= 2
    assert kill_while_saving(tmp_path, 2, 0.05) >= first + 1


@pytest.mark.slow
def test_kill_at_many_moments(tmp_path):
    step = 0
    for after_s in np.random.default_rng(0).uniform(0, 0.2, 12):
        left, step = step, kill_while_saving(tmp_path, 2, after_s)
        assert step >= left + 1


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 1)
port, index, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index, heartbeat_timeout_seconds=10)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kdjax.checkpoint import CheckpointConfig, Checkpoints, open_params
from kdjax.errors import UserError
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
def make(step):
    whole = np.arange(8, dtype=np.float32) + step
    return {"params": {"student": {"w": jax.make_array_from_callback((8,), sharding, lambda index: whole[index])}}}
wanted = {"params": {"student": {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}}}
with Checkpoints(directory, CheckpointConfig(keep=2)) as checkpoints:
    assert checkpoints.restore(wanted) is None
    for step in (1, 2, 3):
        states = {"shards": {str(shard): "x" * shard * step for shard in range(index, 4, 2)}, "first": index}
        checkpoints.save(step, make(step), states, "{}", 1 / step)
        checkpoints.check()
    checkpoints.save(3, make(3), states, "{}", 0.1)
with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    restored = checkpoints.restore(wanted)
    assert restored.step == 3, restored.step
    for shard in restored.state["params"]["student"]["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, (np.arange(8, dtype=np.float32) + 3)[shard.index])
    assert restored.iterator_state == {"shards": {str(s): "x" * s * 3 for s in range(4)}, "first": 0}
np.testing.assert_array_equal(open_params(directory.parent).params["w"], np.arange(8, dtype=np.float32) + 3)
if index == 0:
    (directory / "3" / "run" / "metadata").write_text("{}")
jax.experimental.multihost_utils.sync_global_devices("damaged")
with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    assert checkpoints.restore(wanted).step == 2
if index == 0:
    (directory / "2" / "manifest.json").unlink()
jax.experimental.multihost_utils.sync_global_devices("all damaged")
try:
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        checkpoints.restore(wanted)
except UserError as error:
    print("refused", flush=True)
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    directory = tmp_path / "checkpoints"
    processes = [start(TWO_PROCESSES, port, index, directory) for index in range(2)]
    try:
        for process in processes:
            assert process.communicate(timeout=120)[0].endswith("refused\n")
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    assert step_names(directory) == ["2", "3.damaged"]
