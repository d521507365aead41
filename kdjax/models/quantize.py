"""Weights that are kept as whole numbers of 8 or 4 bits with scales, by qwix, and read as floats where they are used.

Matrices of layers and experts take the bits that are asked for; embedding and head take 8, and what is small (norms,
biases, routers, tables of positions) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import qwix

from kdjax.models.config import Quantize
from kdjax.models.model_file import Index, LazyTensor
from kdjax.models.paths import input_axes, nested, parameter_paths
from kdjax.shapes import Array

GROUP = 32
"""How many inputs share a scale in 4 bits; in 8 bits all inputs of an output do."""

DTYPES = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}
SCALES = {"int8": np.dtype(np.float32), "int4": np.dtype(ml_dtypes.bfloat16)}
RANGES = {"int8": "absmax", "int4": "minmax"}
"""What a scale is made for, in qwix's words: the largest absolute number, or all from the least to the largest, which
takes a zero point."""

EIGHT_BITS = ("embed/embedding", "head/kernel")
"""Read once a token, and few of the numbers of a large model: 4 bits would save little there and cost much."""

Tree = dict[str, Any]


def kind_of(path: str, kind: Quantize) -> Quantize:
    """Return how the parameter at a path is kept in a model that is quantised to `kind`."""
    if kind != "none" and path in EIGHT_BITS:
        return "int8"
    is_matrix = path.endswith("/kernel") and "layers" in path.split("/") and not path.endswith("/router/kernel")
    return kind if is_matrix else "none"


def quantized(tensors: Tree, kind: Quantize) -> Tree:
    """Return a model's lazy tensors, those that are quantised as QArrays of them: each part is quantised when read."""
    return _each(tensors, kind, _lazy)


def quantized_axes(axes: Tree, kind: Quantize) -> Tree:
    """Return the names of the axes of `quantized`: scales lie as their numbers do."""
    return _each(axes, kind, lambda path, names, own: _made_of(names, names, names, own))


def _each(tree: Tree, kind: Quantize, function: Callable[[str, Any, Quantize], Any]) -> Tree:
    kinds: dict[str, Quantize] = {path: kind_of(path, kind) for path in parameter_paths(tree)}
    leaves = parameter_paths(tree).items()
    return nested({path: leaf if kinds[path] == "none" else function(path, leaf, kinds[path]) for path, leaf in leaves})


def dequantized(parameter: Any, dtype: Any) -> Array:
    """Return a quantised parameter as an array of `dtype`, computed in float32; one that is not as it is."""
    is_quantized = isinstance(parameter, qwix.QArray)
    return qwix.dequantize(parameter.astype(jnp.float32)).astype(dtype) if is_quantized else parameter


def dense(parameter: Any, dtype: Any) -> Array:
    """Return a parameter, quantised or not, as an array of `dtype`."""
    return dequantized(parameter, dtype).astype(dtype)


def _made_of(numbers: Any, scales: Any, zero: Any, kind: Quantize) -> Any:
    """Return a QArray of whatever stands for its arrays; there are zero points only where the kind has them."""
    make: Any = qwix.QArray
    return make(numbers, scales, zero if RANGES[kind] == "minmax" else None, qtype=DTYPES[kind])


def _tiles(path: str, shape: tuple[int, ...], kind: Quantize) -> tuple[int, ...]:
    """Return for each axis how many entries along it share a scale."""
    first, end = input_axes(path)
    if kind == "int8":
        return tuple(size if first <= axis < end else 1 for axis, size in enumerate(shape))
    inner = shape[end - 1]
    return tuple((GROUP if inner % GROUP == 0 else inner) if axis == end - 1 else 1 for axis in range(len(shape)))


def _lazy(path: str, tensor: LazyTensor, kind: Quantize) -> Any:
    """Return a matrix as a QArray of lazy tensors: of numbers, of scales, and where there are some of zero points."""
    tiles = _tiles(path, tensor.shape, kind)
    coarse = tuple(size // tile for size, tile in zip(tensor.shape, tiles, strict=True))

    def part(index: Index) -> Any:
        """Return what is at an index that counts tiles, quantised."""
        whole = tuple(slice(at.start * tile, at.stop * tile) for at, tile in zip(index, tiles, strict=True))
        groups = {axis: tile for axis, tile in enumerate(tiles) if tile > 1}
        return qwix.quantize(
            jnp.asarray(tensor.read(whole)),
            DTYPES[kind],
            channelwise_axes=[axis for axis, tile in enumerate(tiles) if tile == 1],
            tiled_axes=groups,
            calibration_method=RANGES[kind],
            scale_dtype=SCALES[kind],
        )

    def numbers(index: Index) -> np.ndarray:
        at = _spans(index, tensor.shape)
        around = tuple(slice(i.start // tile, -(-i.stop // tile)) for i, tile in zip(at, tiles, strict=True))
        inside = tuple(
            slice(i.start - j.start * tile, i.stop - j.start * tile)
            for i, j, tile in zip(at, around, tiles, strict=True)
        )
        return np.concatenate([np.asarray(part(row).qvalue)[(slice(None), *inside[1:])] for row in _rows(path, around)])

    def of_groups(field: str, dtype: np.dtype) -> LazyTensor:
        def read(index: Index) -> np.ndarray:
            return np.concatenate([getattr(part(row), field) for row in _rows(path, _spans(index, coarse))])

        return LazyTensor(coarse, read, dtype, casts=False)

    whole = LazyTensor(tensor.shape, numbers, DTYPES[kind], casts=False)
    return _made_of(whole, of_groups("scale", SCALES[kind]), of_groups("zero_point", DTYPES[kind]), kind)


def _spans(index: Index, shape: tuple[int, ...]) -> Index:
    """Return an index whose slices say where they begin and end."""
    return tuple(slice(*at.indices(size)[:2]) for at, size in zip(index, shape, strict=True))


def _rows(path: str, index: Index) -> list[Index]:
    """Return an index cut along the axis of layers, so that one layer's floats are in memory at a time."""
    first, *others = index
    if "layers" not in path.split("/"):
        return [index]
    return [(slice(layer, layer + 1), *others) for layer in range(first.start, first.stop)]
