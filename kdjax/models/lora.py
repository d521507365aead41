"""Models of which only a part is trained: low-rank adapters beside matrices, and parameters parted by their paths.

An adapter is two leaves beside a kernel, ``lora_a`` and ``lora_b``, which `kdjax.models.layers.Linear` adds; α/rank is
multiplied in when both parts are put together, so no layer knows of it.
Paper: Hu et al. 2021, LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError, did_you_mean, listed
from kdjax.models.config import Lora, ModelSpec
from kdjax.models.model_file import Index, LazyTensor, ModelFile, lazy
from kdjax.models.paths import input_axes, nested, parameter_paths
from kdjax.shapes import Array

TARGETS = ("q", "k", "v", "out", "gate", "up", "down")
"""What an adapter can stand beside."""

Tree = dict[str, Any]


def is_trained(spec: ModelSpec, path: str) -> bool:
    """Return whether a parameter of a model is trained where that is as `spec` says."""
    return _begins(path, spec.trained) if spec.trained else not (spec.lora.rank or spec.soft_prompt.tokens)


def _begins(path: str, names: tuple[str, ...]) -> bool:
    return f"{path}/".startswith(tuple(f"{name}/" for name in names))


def part(tree: Tree, is_first: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Return the leaves whose path is of the first part, and the others; neither has an empty branch."""
    paths = parameter_paths(tree)
    first = {path: leaf for path, leaf in paths.items() if is_first(path)}
    return nested(first), nested({path: leaf for path, leaf in paths.items() if path not in first})


def join(first: Tree, second: Tree) -> Tree:
    """Return the leaves of both; where both have one, the second's."""
    return nested(parameter_paths(first) | parameter_paths(second))


def assembled(frozen: Tree, trained: Tree, scale: float) -> Tree:
    """Return a model's parameters from both parts; what its adapters add is multiplied by `scale`, α/rank."""
    scaled = {path: x * scale if path.endswith("/lora_b") else x for path, x in parameter_paths(trained).items()}
    return join(frozen, nested(scaled))


def check(spec: ModelSpec, params: Tree) -> None:
    """Check that a model with such parameters has all that is to be trained.

    Raises:
        UserError: a name that fits no parameter.
    """
    paths = list(parameter_paths(params))
    for name in spec.trained:
        if not any(_begins(path, (name,)) for path in paths):
            known = {path[:end] for path in paths for end in (*_slashes(path), len(path))}
            raise UserError(f"trained names {name!r}, where no parameter's path begins{did_you_mean(name, known)}")
    if not spec.lora.rank:
        return
    for name in spec.lora.targets:
        if name not in TARGETS:
            raise UserError(f"lora.targets names {name!r}{did_you_mean(name, TARGETS)}")
    if not _kernels(spec.lora, params):
        raise UserError(f"the model has none of the matrices that lora.targets names: {listed(spec.lora.targets)}")


def _slashes(path: str) -> list[int]:
    return [at for at, letter in enumerate(path) if letter == "/"]


def _kernels(lora: Lora, tree: Tree) -> dict[str, Any]:
    """Return the leaves of kernels that get an adapter, by the path of their branch; experts' get none."""
    found = {}
    for path, leaf in parameter_paths(tree).items():
        branch, _, name = path.rpartition("/")
        is_target = branch.rpartition("/")[2] in lora.targets and "/experts/" not in path
        if lora.rank and name == "kernel" and is_target:
            found[branch] = leaf
    return found


def init_adapters(lora: Lora, params: Tree, key: Array) -> Tree:
    """Return new adapters of a model with parameters of such shapes, float32; what they add is 0 at first.

    ``lora_a`` is uniform within 1/√inputs either way, ``lora_b`` is 0.
    """
    adapters = {}
    for path, kernel in _kernels(lora, params).items():
        (first, end), shape = input_axes(path), tuple(kernel.shape)
        bound = 1 / math.sqrt(math.prod(shape[first:end]))
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        adapters[f"{path}/lora_a"] = jax.random.uniform(own, (*shape[:end], lora.rank), jnp.float32, -bound, bound)
        adapters[f"{path}/lora_b"] = jnp.zeros((*shape[:first], lora.rank, *shape[end:]), jnp.float32)
    return nested(adapters)


def adapter_axes(lora: Lora, axes: Tree) -> Tree:
    """Return the names of the adapters' axes, from those of the model's; that of the rank is None."""
    names = {}
    for path, of_kernel in _kernels(lora, axes).items():
        first, end = input_axes(path)
        names[f"{path}/lora_a"] = (*of_kernel[:end], None)
        names[f"{path}/lora_b"] = (*of_kernel[:first], None, *of_kernel[end:])
    return nested(names)


def merged(base: ModelFile, trained: Tree, lora: Lora) -> ModelFile:
    """Return a model with what was trained of it, in numpy arrays, in the place of its own; adapters are added.

    Raises:
        UserError: a part that does not fit the model.
    """
    tensors, new = parameter_paths(base.tensors), parameter_paths(trained)
    found = dict(tensors)
    for path, array in new.items():
        branch, _, leaf = path.rpartition("/")
        kernel = f"{branch}/kernel"
        if leaf == "lora_b" and kernel in found:
            found[kernel] = _added(branch, found[kernel], new[f"{branch}/lora_a"], array, lora.alpha / lora.rank)
        elif path in tensors and tensors[path].shape == array.shape:
            found[path] = lazy(array)
        elif leaf != "lora_a":
            raise UserError(f"{path} of shape {array.shape} has no place in {base.source}; its base was another model")
    return replace(base, tensors=nested(found))


def _added(path: str, kernel: LazyTensor, a: np.ndarray, b: np.ndarray, scale: float) -> LazyTensor:
    """Return a kernel plus ``scale·a @ b``, layer by layer, computed for what is read of it."""
    first, end = input_axes(path)
    fits = (*a.shape[:-1], *b.shape[first + 1 :]) == kernel.shape and a.shape[-1] == b.shape[first]
    if not fits:
        raise UserError(f"the adapter of {path} has shapes {a.shape} and {b.shape}; its kernel has {kernel.shape}")

    def read(index: Index) -> np.ndarray:
        whole = kernel.read(index)
        left, right = a[index[:end]], b[(*index[:first], slice(None), *index[end:])]
        rank, layers = a.shape[-1], whole.shape[:first]
        left = left.reshape(*layers, math.prod(whole.shape[first:end]), rank)
        right = right.reshape(*layers, rank, math.prod(whole.shape[end:]))
        return whole + np.float32(scale) * (left @ right).reshape(whole.shape)

    return LazyTensor(kernel.shape, read)
