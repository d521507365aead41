"""The small Linen modules that a Transformer is made of. Parameters are float32, named by axis, cast where used."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.models.config import ModelConfig
from kdjax.models.positions import relative_buckets
from kdjax.models.quantize import dense
from kdjax.shapes import Array

INIT_STD = 0.02
ACTIVATIONS = {
    "relu": nn.relu,
    "tanh": jnp.tanh,
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}

Dims = tuple[tuple[str | None, int], ...]
"""Named dimensions in order: ``(("heads", 4), ("head_width", 16))``."""


def parameter(module: nn.Module, name: str, init: Any, dims: Dims) -> Array:
    """Return a float32 parameter of `module`, its axes named for sharding."""
    names, shape = zip(*dims, strict=True)
    return module.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)


Layout = Callable[[Array, tuple[str | None, ...]], Array]
"""``layout(x, names)``: x, placed as the names of its dimensions ask; a model knows names, not meshes."""


def anywhere(x: Array, names: tuple[str | None, ...]) -> Array:
    """Return x as it is: the layout of a model that no mesh is given to."""
    return x


def dropout(x_BTD: Array, row_keys_B: Array | None, site: Array | int, rate: float) -> Array:
    """Return x with entries dropped at `rate` and the rest scaled up; x itself when no keys are given.

    A row's mask depends on its key and the site alone, so it is the same wherever the row is placed.
    """
    if row_keys_B is None or rate == 0.0:
        return x_BTD

    def keep(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x_BTD.shape[1:])

    return jnp.where(jax.vmap(keep)(row_keys_B), x_BTD / (1.0 - rate), jnp.zeros_like(x_BTD))


class Linear(nn.Module):
    """A kernel contracted with the last dimensions of its input, and maybe a bias; an adapter beside it is added."""

    inputs: Dims
    outputs: Dims
    bias: bool
    dtype: Any
    std: float = INIT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return ``x @ kernel + bias`` over the named dimensions."""
        kernel = parameter(self, "kernel", nn.initializers.normal(self.std), self.inputs + self.outputs)
        y = jnp.tensordot(x, dense(kernel, self.dtype), axes=len(self.inputs))
        if self.has_variable("params", "lora_a"):
            a, b = (jnp.asarray(self.get_variable("params", f"lora_{which}"), self.dtype) for which in "ab")
            y = y + jnp.tensordot(jnp.tensordot(x, a, axes=len(self.inputs)), b, axes=1)
        if self.bias:
            dims = tuple((None if name == "embed" else name, size) for name, size in self.outputs)
            bias = parameter(self, "bias", nn.initializers.zeros, dims)
            y = y + jnp.expand_dims(bias.astype(self.dtype), tuple(range(y.ndim - bias.ndim)))
        return y


class Embedding(nn.Module):
    """A table of rows, read by index."""

    name_of_rows: str | None
    rows: int
    width: int
    dtype: Any
    layout: Layout

    @nn.compact
    def __call__(self, index_BT: Array) -> Array:
        """Return the rows at `index_BT` (NaN out of range), read in float32 so that gradients add up in float32."""
        dims = ((self.name_of_rows, self.rows), ("embed", self.width))
        table = parameter(self, "embedding", nn.initializers.normal(INIT_STD), dims)
        # Gathered over all but its rows first: a table split both ways would have its result rearranged whole.
        table = jax.tree.map(lambda x: self.layout(x, (self.name_of_rows, None)), table)
        return dense(jax.tree.map(partial(jnp.take, indices=index_BT, axis=0), table), self.dtype)


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances, added to the scores of all layers alike."""

    config: ModelConfig

    @nn.compact
    def __call__(self, back_BTS: Array) -> Array:
        """Return the biases, float32, [B, H, T, S]. Paper: Raffel et al. 2019, T5, arXiv:1910.10683, section 2.1."""
        c = self.config
        dims = ((None, c.relative_buckets), ("heads", c.heads))
        table = parameter(self, "embedding", nn.initializers.normal(INIT_STD), dims)
        buckets_BTS = relative_buckets(back_BTS, c.relative_buckets, c.relative_distance, c.causal)
        return jnp.moveaxis(table.astype(jnp.float32)[buckets_BTS], -1, 1)


class HeadParameters(nn.Module):
    """The parameters of a head, which the loss applies."""

    inputs: Dims
    outputs: tuple[str | None, int]
    kernel: bool
    bias: bool

    @nn.compact
    def __call__(self) -> None:
        """Declare those that there are."""
        if self.kernel:
            parameter(self, "kernel", nn.initializers.normal(INIT_STD), (*self.inputs, self.outputs))
        if self.bias:
            parameter(self, "bias", nn.initializers.zeros, (self.outputs,))


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) or LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

    config: ModelConfig
    dtype: Any
    over: int = 1
    """How many of the last dimensions are normalised as one."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return x normalised over its last dimensions, computed in float32."""
        last = tuple(range(-self.over, 0))
        dims = tuple((None, x.shape[axis]) for axis in last)
        scale, x = parameter(self, "scale", nn.initializers.ones, dims).astype(jnp.float32), x.astype(jnp.float32)
        leading = tuple(range(x.ndim - self.over))
        if self.config.norm == "layer":
            x = x - x.mean(last, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(last, keepdims=True) + self.config.norm_eps)
        x = x * jnp.expand_dims(scale, leading)
        if self.config.norm == "layer" and self.config.norm_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, dims).astype(jnp.float32)
            x = x + jnp.expand_dims(bias, leading)
        return x.astype(self.dtype)


class Mlp(nn.Module):
    """The feed-forward part: gated (SwiGLU: Shazeer 2020, arXiv:2002.05202) or plain."""

    config: ModelConfig
    dtype: Any
    layout: Layout = anywhere

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        """Return ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where nothing gates."""
        c = self.config
        wide, narrow = (("mlp", c.mlp_width),), (("embed", c.width),)
        act = ACTIVATIONS[c.activation]
        up_BTF = Linear(narrow, wide, c.mlp_bias, self.dtype, name="up")(x_BTD)
        if c.gated_mlp:
            inner_BTF = act(Linear(narrow, wide, c.mlp_bias, self.dtype, name="gate")(x_BTD)) * up_BTF
        else:
            inner_BTF = act(up_BTF)
        inner_BTF = self.layout(inner_BTF, ("batch", "sequence", "mlp"))
        return Linear(wide, narrow, c.mlp_bias, self.dtype, branch_std(c), name="down")(inner_BTF)


def branch_std(config: ModelConfig) -> float:
    """Return the initial spread of a kernel that ends a residual branch: smaller the more branches add up."""
    return INIT_STD / math.sqrt(2 * config.layers)
