"""A model is loaded straight into its shards: no device ever holds all of it, and the host no second copy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax.models import LazyTensor, Model, ModelConfig, export

STATUS = Path("/proc/self/status")
LIMIT_SECONDS = 300
# Left to itself malloc keeps what is freed below 32 MB, up to a tenth of the model, and it would count as used.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}

# A leaf is twice in memory while it goes to its devices, so but for the embedding, which comes first, each is an
# eighth of the model at most.
CONFIG = ModelConfig(
    vocab_size=32000, width=1024, layers=4, heads=16, kv_heads=16, head_width=64, mlp_width=2816, tie_head=True
)

# File pages that are mapped are no copies: only memory of the process's own counts.
LOADER = """
import json, sys, threading
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
from kdjax.models import Model, open_model
from kdjax.sharding import MeshConfig, placement

def anonymous():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

file, place = open_model(sys.argv[1]), placement(MeshConfig(**json.loads(sys.argv[2])))
jax.block_until_ready(jax.device_put(0.0, place.replicated))
before, done = anonymous(), threading.Event()
peak = before

def sample():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=sample)
thread.start()
params = jax.block_until_ready(place.load(file.tensors, Model(file.config).logical_axes(), "float32"))
done.set()
thread.join()
leaves = jax.tree.leaves(params)
held = {device.id: 0 for device in jax.devices()}
for leaf in leaves:
    for shard in leaf.addressable_shards:
        held[shard.device.id] += shard.data.nbytes
whole = sum(leaf.nbytes for leaf in leaves)
on_each = sum(leaf.nbytes for leaf in leaves if leaf.is_fully_replicated)
figures = {"whole": whole, "on_each": on_each, "peak": peak - before, "held": list(held.values())}
print(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model of some 300 MB, each tensor drawn when it is written; removed afterwards."""

    def drawn(leaf):
        return LazyTensor(leaf.shape, lambda index: np.random.default_rng(0).random(leaf.shape, np.float32)[index])

    params = jax.tree.map(drawn, jax.eval_shape(Model(CONFIG).init, jax.random.key(0)))
    out = export(CONFIG, params, tmp_path_factory.mktemp("large") / "model", None)
    yield out
    (out / "model.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists() or "RssAnon" not in STATUS.read_text(), reason="memory is read from /proc")
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_a_model_on_eight_devices_is_in_memory_once(directory, mesh):
    """Eight devices of a CPU share the host's memory: their shares together are one model, a second copy is two."""
    got = subprocess.run(
        [sys.executable, "-c", LOADER, str(directory), json.dumps({"data": 1} | mesh)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=os.environ | GIVEN_BACK | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert got.returncode == 0, got.stderr
    figures = json.loads(got.stdout.splitlines()[-1])
    whole, on_each = figures["whole"], figures["on_each"]
    print(
        f"{mesh}: the model has {whole / 1e6:.0f} MB; loading takes {figures['peak'] / whole:.3f} of it at its peak, "
        f"and a device holds {max(figures['held']) / whole:.4f} of it at most"
    )
    assert whole > 300e6 and on_each < 1e-3 * whole
    assert len(figures["held"]) == 8 and max(figures["held"]) <= (whole - on_each) / 8 + on_each
    assert 0.9 * whole < figures["peak"] < 1.25 * whole
