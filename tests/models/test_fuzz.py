"""Malformed model files, 2,400 of them: each is read, or refused in one clear line; nothing hangs, crashes or leaks.

Each kind runs in a process of its own with a limit of time and memory, whose last line says how many were refused.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "golden"
EACH, SECONDS, GIBIBYTES = 600, 420, 12
VALUES = [None, True, -1, 0, 1, 3, 2**31, 2**31 - 1, 2**62, 1e308, float("nan"), "", "x", "../x", [], [[]], {}]


def tree(directory):
    return {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kind", ["config", "safetensors", "index", "gguf"])
def test_malformed_files_are_read_or_refused(kind, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "beside").write_text("untouched")
    environment = os.environ | {"KDJAX_CACHE": str(inside / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, kind, str(inside)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["read"] + counts["refused"] == EACH and counts["refused"] > EACH // 3
    outside = {path: size for path, size in tree(tmp_path).items() if inside not in path.parents}
    assert outside == {tmp_path / "beside": len("untouched")}


def mutated_json(rng, value):
    """One place of a JSON value replaced, left out, or given another's value."""
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    node, key = rng.choice(places)
    action = rng.randrange(4)
    if action == 0:
        del node[key]
    elif action == 1:
        other, at = rng.choice(places)
        node[key] = json.loads(json.dumps(other[at]))
    else:
        node[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return value


def mutated_bytes(rng, data, within):
    """Some bytes of the first ones changed, or all cut short."""
    data = bytearray(data)
    if rng.random() < 0.2:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(min(within, len(data)))] = rng.choice((0, 1, 255, rng.randrange(256)))
    return bytes(data)


def make_config(rng, directory):
    source = rng.choice(sorted(path.parent for path in GOLDEN.glob("*/config.json")))
    shutil.copyfile(source / "model.safetensors", directory / "model.safetensors")
    text = (source / "config.json").read_bytes()
    if rng.random() < 0.8:
        hf = json.loads(text)
        for _ in range(rng.choice((1, 1, 3))):
            hf = mutated_json(rng, hf) if hf else hf
        text = json.dumps(hf).encode()
    else:
        text = mutated_bytes(rng, text, len(text))
    (directory / "config.json").write_bytes(text)


def make_safetensors(rng, directory):
    source = GOLDEN / rng.choice(("llama_tied", "gpt2", "gemma3"))
    shutil.copyfile(source / "config.json", directory / "config.json")
    data = (source / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.6:
        header = json.dumps(mutated_json(rng, json.loads(data[8 : 8 + size]))).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    else:
        data = mutated_bytes(rng, data, 8 + size)
    (directory / "model.safetensors").write_bytes(data)


def make_index(rng, directory):
    source = GOLDEN / "llama_tied"
    shutil.copyfile(source / "config.json", directory / "config.json")
    data = (source / "model.safetensors").read_bytes()
    (directory / "a-1.safetensors").write_bytes(data)
    names = [name for name in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a-1.safetensors")}
    if rng.random() < 0.7:
        for _ in range(rng.choice((1, 1, 3))):
            index = mutated_json(rng, index) if index else index
        text = json.dumps(index).encode()
    else:
        text = json.dumps(index).encode()
        text = mutated_bytes(rng, text, len(text))
    (directory / "model.safetensors.index.json").write_bytes(text)


def run(kind, inside):
    """Read all; what is not an error of ours ends the process with its trace, and the input that did it."""
    sys.path.insert(0, str(Path(__file__).parent))
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES * 2**30,) * 2)
    import jax
    import tiny_gguf

    from kdjax.errors import UserError
    from kdjax.models import open_model

    rng, counts = random.Random(0), {"read": 0, "refused": 0}
    if kind == "gguf":
        sound = tiny_gguf.write(inside / "sound.gguf").read_bytes()
    makers = {"config": make_config, "safetensors": make_safetensors, "index": make_index}
    for number in range(EACH):
        here = inside / str(number)
        here.mkdir()
        if kind == "gguf":
            target = here / "model.gguf"
            target.write_bytes(mutated_bytes(rng, sound, 6000))
        else:
            target = here
            makers[kind](rng, here)
        print(f"{kind} {number}", flush=True)
        try:
            file = open_model(str(target))
            jax.tree.map(lambda tensor: tensor.all(), file.tensors)
            counts["read"] += 1
        except UserError as error:
            assert str(error) and "\n" not in str(error), error
            counts["refused"] += 1
        shutil.rmtree(here)
    print(json.dumps(counts))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
