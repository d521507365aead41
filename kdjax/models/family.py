"""What a family of models is: how its config.json reads and writes, and where each weight lies in its checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdjax.errors import UserError
from kdjax.models.config import ModelConfig


@dataclass(frozen=True)
class Weight:
    """Where one of our parameters lies on disk, both layouts written in the letters of `kdjax.shapes`.

    ``Weight("layers.{}.self_attn.q_proj.weight", "HK,D", "DHK")``: for each layer a matrix on disk whose rows are heads
    times head width and whose columns are the model width; our parameter has the axes D, H, K.

    Attributes:
        name: the tensor's name, a first ``{}`` standing for the layer and a second for the expert.
        disk: the dimensions on disk, each one letter, or several joined to one; ``3`` counts the parts fused into it,
            ``HK+GK+GK`` are parts fused one after the other.
        ours: the letters of our parameter, without a leading L or LE.
        part: which of the fused parts this is.
        less: what the tensor on disk is smaller by, as scales of norms that are stored as their distance from 1.
        layers: the letter of how many layers there are; M is an encoder's beside a decoder.
        first: the first layer that has it on disk; those before have it not, and are filled with ones.
    """

    name: str
    disk: str
    ours: str
    part: int | None = None
    less: float = 0.0
    layers: str = "L"
    first: int = 0

    def names(self, sizes: dict[str, int]) -> dict[tuple[int, ...], str]:
        """Return the names of the tensors by what they are of our parameter: all, a layer, or a layer's expert."""
        counts = [range(sizes[letter]) for letter in (self.layers + "E")[: self.name.count("{}")]]
        found = {index: self.name.format(*index) for index in itertools.product(*counts)}
        return {index: name for index, name in found.items() if not index or index[0] >= self.first}

    def disk_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the tensor's shape on disk."""
        return tuple(sum(_sizes(group, sizes)) for group in self.disk.split(","))

    def from_disk(self, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """Return our parameter, of one layer: a view of the tensor on disk where that is the same numbers."""
        for axis, group in enumerate(self.disk.split(",")):
            if "+" in group:
                ends = list(itertools.accumulate(_sizes(group, sizes)))
                tensor = np.split(tensor, ends[:-1], axis=axis)[self.part or 0]
        whole = tensor.reshape([sizes[letter] for letter in self._axes])
        if "3" in self._axes:
            whole = np.moveaxis(whole, self._axes.index("3"), 0)[self.part]
        whole = whole.transpose([self._own_axes.index(letter) for letter in self.ours])
        return whole.astype(np.float32) + np.float32(self.less) if self.less else whole

    def laid(self, parameter: np.ndarray) -> np.ndarray:
        """Return our parameter, of one layer, with its axes in the order and with the numbers that it has on disk."""
        whole = parameter.transpose([self.ours.index(letter) for letter in self._own_axes])
        return whole - np.float32(self.less) if self.less else whole

    @property
    def _axes(self) -> str:
        """The letters on disk, of what is fused only this part's."""
        groups = (group.split("+") for group in self.disk.split(","))
        return "".join(parts[(self.part or 0) % len(parts)] for parts in groups)

    @property
    def _own_axes(self) -> str:
        return self._axes.replace("3", "")


def _sizes(group: str, sizes: dict[str, int]) -> list[int]:
    """Return the sizes of what is fused to one dimension on disk."""
    return [math.prod(sizes[letter] for letter in part) for part in group.split("+")]


def to_disk(weights: Sequence[Weight], parameters: Sequence[np.ndarray], sizes: dict[str, int]) -> np.ndarray:
    """Return the tensor on disk made of our parameter of a layer, or of all those that are fused into it, in order."""
    first, shape = weights[0], weights[0].disk_shape(sizes)
    laid = [weight.laid(parameter) for weight, parameter in zip(weights, parameters, strict=True)]
    if "3" in first.disk:
        return np.stack(laid, axis=first._axes.index("3")).reshape(shape)
    groups = first.disk.split(",")
    axis = next((axis for axis, group in enumerate(groups) if "+" in group), 0)
    flat = [part.reshape([-1 if at == axis else size for at, size in enumerate(shape)]) for part in laid]
    return np.concatenate(flat, axis=axis) if len(flat) > 1 else flat[0]


def dense(path: str, name: str, disk: str, ours: str) -> dict[str, Weight]:
    """Return where a kernel and its bias lie: on disk weight and bias, the outputs first."""
    outputs = disk.partition(",")[0]
    return {
        f"{path}/kernel": Weight(f"{name}.weight", disk, ours),
        f"{path}/bias": Weight(f"{name}.bias", outputs, outputs),
    }


def norm(path: str, name: str, first: int = 0) -> dict[str, Weight]:
    """Return where a LayerNorm's scale and bias lie, which are called weight and bias on disk."""
    return {
        f"{path}/scale": Weight(f"{name}.weight", "D", "D", first=first),
        f"{path}/bias": Weight(f"{name}.bias", "D", "D", first=first),
    }


def expert_weights(block: str, *, gate: str, up: str, down: str) -> dict[str, Weight]:
    """Return where the router's and the experts' weights lie, below `block` and by these names of their matrices."""
    expert = block + "experts.{}."
    return {
        "layers/router/kernel": Weight(block + "gate.weight", "E,D", "DE"),
        "layers/experts/gate/kernel": Weight(f"{expert}{gate}.weight", "F,D", "DF"),
        "layers/experts/up/kernel": Weight(f"{expert}{up}.weight", "F,D", "DF"),
        "layers/experts/down/kernel": Weight(f"{expert}{down}.weight", "D,F", "FD"),
    }


@dataclass(frozen=True)
class Family:
    """A row of `registry.FAMILIES`.

    Attributes:
        config_from_hf: config.json -> ours; raises UserError for what the Transformer here does not compute.
        config_to_hf: ours -> config.json.
        weights: parameter path, ``layers/attention/q/kernel`` -> where it lies.
        prefix: what some checkpoints leave out at the beginning of names.
        ignored: a regular expression of names, prefix aside, that hold nothing to load: buffers of old versions, and
            the copy of a tied head.
        plain: those of the weights that lie elsewhere where mlps are not gated.
    """

    config_from_hf: Callable[[dict[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    weights: dict[str, Weight]
    prefix: str
    ignored: str
    plain: Mapping[str, Weight] = field(default_factory=dict)

    def weights_of(self, config: ModelConfig) -> dict[str, Weight]:
        """Return where the weights of an architecture of this family lie; of some that it may not have, too."""
        return self.weights if config.gated_mlp else {**self.weights, **self.plain}


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """Return the size of each letter that weights are written in."""
    return {
        "D": config.width,
        "H": config.heads,
        "G": config.kv_heads,
        "K": config.head_width,
        "F": config.mlp_width,
        "V": config.vocab_size,
        "T": config.max_positions + config.first_position,
        "L": config.layers,
        "E": config.experts,
        "X": config.token_types,
        "Y": config.labels,
        "Z": config.width,
        "M": config.encoder_layers,
        "U": config.relative_buckets,
        "3": 3,
    }


LARGEST = 2**31
"""No number of a config.json is as large; sizes beyond would not fit an index."""

HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Hugging Face's name of an activation -> ours; of two names the first is written."""


def hf_activation(name: str) -> str:
    """Return Hugging Face's name of an activation of ours."""
    return next(theirs for theirs, ours in HF_ACTIVATIONS.items() if ours == name)


def hf_common(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """Return what most families write alike into a config.json."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_head,
    }


def read_activation(hf: dict[str, Any], key: str, default: str) -> Any:
    """Return our name of the activation that a config.json asks for."""
    name = read(hf, key, str, default)
    if name not in HF_ACTIVATIONS:
        raise UserError(f"{key} is {name!r}; wanted one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[name]


def read(hf: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Return a value of a config.json, checked for its kind; `default` where it is absent or null.

    Raises:
        UserError: it is of another kind, a number out of range, or absent without a default.
    """
    value = hf.get(key)
    if value is None:
        if default is None:
            raise UserError(f"{key} is missing")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{key} is {value!r}; wanted a value of type {kind.__name__}")
    if kind in (int, float) and not 0 < value < LARGEST:
        raise UserError(f"{key} is {value!r}; wanted a positive number below {LARGEST:,}")
    return value


def with_defaults(hf: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with what a key means to a family that is absent or null."""
    return defaults | {key: value for key, value in hf.items() if value is not None}


def refuse_others(hf: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    """Check that each key is absent or has one of the values that are computed here; others would load wrongly."""
    for key, values in allowed.items():
        if key in hf and hf[key] not in values:
            wanted = " or ".join("null" if value is None else repr(value) for value in values)
            raise UserError(f"{key} is {hf[key]!r}, which kdjax does not compute; wanted {wanted}")
