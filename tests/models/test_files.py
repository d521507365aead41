"""The safetensors reader and writer against the safetensors package, and against damaged files."""

import json
import stat

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kdjax.errors import UserError
from kdjax.models.files import map_safetensors, read_json, whole_directory, write_safetensors
from kdjax.models.model_file import lazy

RNG = np.random.default_rng(0)
TENSORS = {"a": RNG.normal(size=(3, 5)).astype(np.float32), "b.c": RNG.normal(size=(7,)).astype(np.float32)}


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_the_package_writes_is_read(tmp_path):
    saved = TENSORS | {"half": TENSORS["a"].astype(np.float16), "brain": TENSORS["a"].astype(jnp.bfloat16)}
    safetensors.numpy.save_file(saved, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = map_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == saved.keys()
    for name, array in saved.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_is_written_the_package_reads(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: lazy(array) for name, array in TENSORS.items()}, dtype)
    kind = {"F32": np.float32, "BF16": jnp.bfloat16}[dtype]
    for name, array in safetensors.numpy.load_file(path).items():
        np.testing.assert_array_equal(array, TENSORS[name].astype(kind))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "cannot read"),
        (lambda p: p.write_bytes(b""), "cannot read"),
        (lambda p: p.write_bytes(b"abc"), "cut short or not a safetensors file"),
        (lambda p: p.write_bytes((2**60).to_bytes(8, "little") + b"{}"), "cut short or not a safetensors file"),
        (lambda p: raw(p, b"{nonsense"), "damaged header"),
        (lambda p: raw(p, b"[" * 100_000), "damaged header"),
        (lambda p: raw(p, b"[1]"), "damaged header"),
        (lambda p: raw(p, b'{"a": {}, "a": {}}'), "it names 'a' twice"),
        (lambda p: raw(p, {"a": entry("F8_E4M3", (8,))}, bytes(8)), "tensor a has dtype F8_E4M3; wanted one of F32"),
        (lambda p: raw(p, {"a": entry("U64", (1,))}, bytes(8)), "tensor a has dtype U64"),
        (lambda p: raw(p, {"a": entry()}, bytes(7)), "cut short within tensor a"),
        (lambda p: raw(p, {"a": entry(shape=(3,))}, bytes(12)), "tensor a has a shape that does not fit its bytes"),
        (lambda p: raw(p, {"a": entry(shape=(-2,))}, bytes(8)), "tensor a has a shape that does not fit"),
        (lambda p: raw(p, {"a": entry(offsets=(-8, 0))}, bytes(8)), "tensor a has a shape that does not fit"),
        (lambda p: raw(p, {"a": {"dtype": "F32"}}, bytes(8)), "tensor a has a damaged header entry"),
        (lambda p: raw(p, {"a": 5}, bytes(8)), "tensor a has a damaged header entry"),
        (lambda p: raw(p, {"a": entry(dtype=["F32"])}, bytes(8)), "tensor a has dtype"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, make, message):
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        map_safetensors(path)
    assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_random_damage_is_never_a_traceback(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(1), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(header)] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(len(whole) // 2, len(whole) + 1)])
        try:
            map_safetensors(path)
        except UserError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "holds a list; wanted a JSON object")])
def test_bad_json_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot read .*absent.json"):
        read_json(tmp_path / "absent.json")


def test_a_directory_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "out") as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with whole_directory(tmp_path / "out") as directory:
        (directory / "all").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "all").is_file()
    with pytest.raises(UserError, match="not an empty directory"), whole_directory(tmp_path / "out"):
        pass
