"""A model on disk whose weights are read when and where they are needed, part by part."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax.errors import UserError
from kdjax.models.config import GIST, SOFT_PROMPT, ModelConfig, ModelSpec

Index = tuple[slice, ...]

HASHED_AT_ONCE = 64 * 2**20


@dataclass(frozen=True)
class LazyTensor:
    """An array that is not read yet; a leaf in a tree of parameters.

    Attributes:
        shape: of the whole.
        read: gives the part at an index, a slice for each axis, as a float32 array of its own.
        dtype: of what `read` gives.
        casts: it may be cast to the dtype of a computation; what is quantised may not.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    dtype: np.dtype = np.dtype(np.float32)
    casts: bool = True

    def all(self) -> np.ndarray:
        """Return the whole array."""
        return self.read((slice(None),) * len(self.shape))


def lazy(array: np.ndarray) -> LazyTensor:
    """Return an array (a mapped file, say) as a LazyTensor."""
    return LazyTensor(tuple(array.shape), lambda index: np.array(array[index], np.float32, order="C"))


def stacked(layers: Sequence[LazyTensor]) -> LazyTensor:
    """Return one tensor with a leading axis over `layers`, which are alike in shape."""

    def read(index: Index) -> np.ndarray:
        rows = layers[index[0]]
        parts = [row.read(index[1:]) for row in rows]
        return np.stack(parts) if parts else np.zeros((0, *layers[0].read(index[1:]).shape), np.float32)

    return LazyTensor((len(layers), *layers[0].shape), read)


@dataclass(frozen=True)
class ModelFile:
    """A model that can be loaded.

    Attributes:
        config: its architecture.
        tensors: a tree like a model's parameters, of LazyTensors.
        source: what it was opened by.
        tokenizer: its tokenizer.json, or None.
        base: of a model with a soft prompt, the model without it.
    """

    config: ModelConfig
    tensors: dict[str, Any]
    source: str
    tokenizer: Path | None
    base: ModelSpec | None = None

    def check_plain(self) -> None:
        """Check that it has no soft prompt and no gist.

        Raises:
            UserError: it has one.
        """
        for branch, title in ((SOFT_PROMPT, "soft prompt"), (GIST, "gist")):
            if branch in self.tensors:
                raise UserError(f"{self.source} has a {title}, which is for a teacher or generation; name its base")

    def sha256(self) -> str:
        """Return a hash of the architecture and of all weights as float32: the same for every format on disk."""
        return self._digest

    @cached_property
    def _digest(self) -> str:  # all weights are read for it, so once
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for path, tensor in jax.tree_util.tree_leaves_with_path(self.tensors):
            digest.update(f"{jax.tree_util.keystr(path)} {tensor.shape}".encode())
            for part in _rows(tensor):
                digest.update(np.ascontiguousarray(part, "<f4").data)
        return digest.hexdigest()


def _rows(tensor: LazyTensor) -> Iterator[np.ndarray]:
    """Yield the tensor cut along its first axis, so that little of it is in memory at once."""
    first, *others = tensor.shape
    step = max(1, HASHED_AT_ONCE // (4 * max(1, math.prod(others))))
    for start in range(0, first, step):
        yield tensor.read((slice(start, min(start + step, first)), *(slice(None) for _ in others)))


def select_encoder_layers(file: ModelFile, keep: Sequence[int]) -> ModelFile:
    """Return an encoder-decoder with only these layers of its encoder, as `select_layers` does for the decoder's."""
    if not file.config.encoder_layers:
        raise UserError(
            f"cannot keep encoder layers {tuple(keep)} of {file.source}: it has no encoder beside a decoder"
        )
    encoder = file.tensors["encoder"]
    encoder = encoder | {"layers": _kept(encoder["layers"], file.config.encoder_layers, keep, file.source)}
    config = replace(file.config, encoder_layers=len(keep))
    return replace(file, config=config, tensors=file.tensors | {"encoder": encoder})


def _kept(tensors: Any, layers: int, keep: Sequence[int], source: str) -> Any:
    """Return a tree of stacked tensors with only the layers `keep`."""
    missing = [layer for layer in keep if not 0 <= layer < layers]
    if missing or not keep:
        raise UserError(
            f"cannot keep layers {tuple(keep)} of {source}: wanted at least one, each from 0 to {layers - 1}"
        )
    return jax.tree.map(lambda tensor: stacked([layer_of(tensor, layer) for layer in keep]), tensors)


def select_layers(file: ModelFile, keep: Sequence[int]) -> ModelFile:
    """Return the model with only the layers `keep` (counted from 0), in that order.

    Raises:
        UserError: no layer, or one that is not there.
    """
    tensors = file.tensors | {"layers": _kept(file.tensors["layers"], file.config.layers, keep, file.source)}
    windows = tuple(file.config.windows[layer] for layer in keep) if file.config.windows else ()
    windows = windows if any(windows) else ()
    unrotated, unnormed = (
        tuple(place for place, layer in enumerate(keep) if layer in without)
        for without in (file.config.unrotated, file.config.unnormed)
    )
    config = replace(file.config, layers=len(keep), windows=windows, unrotated=unrotated, unnormed=unnormed)
    return replace(file, config=config, tensors=tensors)


def select_kept(file: ModelFile, spec: ModelSpec) -> ModelFile:
    """Return the model with only the layers that `spec` keeps."""
    file = select_layers(file, spec.keep_layers) if spec.keep_layers else file
    return select_encoder_layers(file, spec.keep_encoder_layers) if spec.keep_encoder_layers else file


def layer_of(tensor: LazyTensor, layer: int) -> LazyTensor:
    """Return one entry of a tensor's first axis, without that axis."""
    return LazyTensor(tensor.shape[1:], lambda index: tensor.read((slice(layer, layer + 1), *index))[0])
