"""Reading and writing of what model directories hold: JSON, safetensors, and whole directories or none."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError
from kdjax.models.model_file import LazyTensor

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
"""The safetensors dtypes that are read and written."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that are never read, since unpickling runs code."""

MAX_HEADER = 100 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_free(out: Path) -> None:
    """Check that `out` can become a new directory.

    Raises:
        UserError: there is something already.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory; give another, or remove it")


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yield a fresh directory beside `out`, which takes that name only when the block has ended well.

    Raises:
        UserError: `out` has something in it already, or cannot be written.
    """
    check_free(out)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


MAPPED = DTYPES | {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_)}
"""With those of buffers that lie beside weights."""


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file by name, mapped and not read.

    Raises:
        UserError: the file is damaged, cut short, or holds a dtype that is not read.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    header = _header(path, data)
    header.pop("__metadata__", None)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    return {name: _mapped(path, name, entry, data[start:]) for name, entry in header.items()}


def _header(path: Path, data: np.ndarray) -> dict[str, Any]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise UserError(f"{path} is cut short or not a safetensors file; get it again")
    try:
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header ({error}); get it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} has a damaged header (it is no object); get it again")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _mapped(path: Path, name: str, entry: Any, data: np.ndarray) -> np.ndarray:
    """Return one tensor's part of the data, its header entry checked against it."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(isinstance(x, int) and x >= 0 for x in (*shape, start, stop))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: tensor {name} has a damaged header entry; get the file again") from error
    if not isinstance(dtype, str) or dtype not in MAPPED:
        raise UserError(f"{path}: tensor {name} has dtype {dtype}; wanted one of {', '.join(DTYPES)}")
    if not whole or stop - start != math.prod(shape) * MAPPED[dtype].itemsize:
        raise UserError(f"{path}: tensor {name} has a shape that does not fit its bytes; get the file again")
    if stop > len(data):
        raise UserError(f"{path} is cut short within tensor {name}; get it again")
    return data[start:stop].view(MAPPED[dtype]).reshape(shape)


def write_safetensors(path: Path, tensors: dict[str, LazyTensor], dtype: str = "F32") -> None:
    """Write tensors one after the other, so that no more than one is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + DTYPES[dtype].itemsize * math.prod(tensor.shape)
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.all(), DTYPES[dtype]).view(np.uint8).data)
