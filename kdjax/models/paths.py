"""Trees of parameters, nested dicts, and what stands in them by path."""

from __future__ import annotations

import math
from typing import Any

import jax


def parameter_count(params: dict) -> int:
    """Return how many numbers a tree of arrays (or of their shapes) holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def path_text(path: tuple[Any, ...]) -> str:
    """Return a parameter's path as ``layers/attention/q/kernel``."""
    return "/".join(step.key for step in path)


def byte_count(params: dict) -> int:
    """Return how many bytes a tree of arrays takes in a device's memory, where numbers of 4 bits are packed."""
    return sum(math.prod(leaf.shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8 for leaf in jax.tree.leaves(params))


def input_axes(path: str) -> tuple[int, int]:
    """Return where the axes of a matrix that are summed over begin, behind those of layers and experts, and end.

    An embedding, which is the transposed head, is summed over its width.
    """
    branches = path.removesuffix("/kernel").split("/")
    first = branches.count("layers") + branches.count("experts") + (branches[-1] == "embedding")
    return first, first + 1 + (branches[-1] == "out")


def parameter_paths(params: dict) -> dict[str, Any]:
    """Return what stands in a nested dict, by path: ``layers/attention/q/kernel``; in the order of names."""
    paths: dict[str, Any] = {}
    for name, node in sorted(params.items()):
        is_branch = isinstance(node, dict)
        paths |= {f"{name}/{rest}": leaf for rest, leaf in parameter_paths(node).items()} if is_branch else {name: node}
    return paths


def nested(paths: dict[str, Any]) -> dict[str, Any]:
    """Return the nested dict of what stands at these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in paths.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[name] = leaf
    return tree
