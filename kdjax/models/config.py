"""Which model: its architecture (`ModelConfig`), and where its weights come from and how it runs (`ModelSpec`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdjax.errors import UserError

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a Transformer; the defaults are a small Llama."""

    family: str = "llama"
    """The row of `kdjax.models.registry.FAMILIES` that names its weights on disk."""
    vocab_size: int = 512
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 16
    mlp_width: int = 128
    max_positions: int = 2048
    """The longest sequence it was made for."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    qkv_bias: bool = False
    out_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    tie_head: bool = True
    """The head is the transposed embedding."""
    dropout: float = 0.0
    """Rate on the embedding and on both residual branches, in training only."""

    def __post_init__(self) -> None:
        """Check what no Transformer can be built from."""
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; wanted at least 1")
        if self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} does not divide by kv_heads {self.kv_heads}")
        if self.positions == "rope" and self.head_width % 2:
            raise UserError(f"head_width is {self.head_width}; rotary positions want an even one")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; wanted from 0 to below 1")


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and how it is run."""

    source: str = "random"
    """`random` (then `architecture` says what), `teacher` (a student cut from its teacher), a known name such as
    smollm2-135m-instruct, a directory in Hugging Face's format, a .gguf file, a run directory, or a hub id."""
    keep_layers: tuple[int, ...] = ()
    """Which layers of the source to keep, in order, counted from 0; empty keeps all."""
    dtype: DType = "float32"
    """Of the computation; parameters that are trained stay float32."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matmuls with weights (`dots`), or whole layers (`full`)."""
    architecture: ModelConfig = ModelConfig()
    """Used only when `source` is `random`."""
