"""Which model: its architecture (`ModelConfig`), and where its weights come from and how it runs (`ModelSpec`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdjax.errors import UserError

DType = Literal["float32", "bfloat16"]
Task = Literal["causal_lm", "masked_lm", "classification", "seq2seq", "embedding"]
Remat = Literal["none", "dots", "full"]
Quantize = Literal["none", "int8", "int4"]


MOST = 10_000
"""Layers of a model, and experts of a layer; what asks for more is damaged."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions, and how they were stretched for texts longer than those that the model was made for."""

    theta: float = 10_000.0
    """The base of the angles."""
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    """A row of `kdjax.models.positions.SCALINGS`."""
    factor: float = 1.0
    """How many times longer texts became; `none` leaves this and all that follows unread."""
    made_for: int = 2048
    """The longest text before."""
    low_frequency: float = 1.0
    """llama3: a wave that turns less often than this in `made_for` positions is stretched by the whole factor."""
    high_frequency: float = 4.0
    """llama3: one that turns more often is left alone."""
    beta_slow: float = 1.0
    """yarn: as `low_frequency`."""
    beta_fast: float = 32.0
    """yarn: as `high_frequency`."""
    truncate: bool = True
    """yarn: whether the two bounds are moved outwards to whole waves."""
    attention_factor: float = 1.0
    """yarn: what queries and keys are multiplied by."""
    share: float = 1.0
    """How much of a head's width is rotated, from the first dimension on."""

    def __post_init__(self) -> None:
        """Check what no angles can be made from."""
        if not self.theta > 1:
            raise UserError(f"rope.theta is {self.theta}; wanted more than 1")
        for name in ("factor", "made_for", "beta_slow", "beta_fast", "attention_factor"):
            if not getattr(self, name) > 0:
                raise UserError(f"rope.{name} is {getattr(self, name)}; wanted more than 0")
        if not 0 < self.share <= 1:
            raise UserError(f"rope.share is {self.share}; wanted more than 0, up to 1")
        if not self.low_frequency < self.high_frequency:
            raise UserError(
                f"rope.low_frequency {self.low_frequency} is not below high_frequency {self.high_frequency}"
            )

    def width(self, head_width: int) -> int:
        """Return how many of a head's dimensions are rotated."""
        return int(head_width * self.share)


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
    norm_bias: bool = True
    """A bias in layer norms."""
    norms: Literal["before", "after", "both", "sum"] = "before"
    """Where each branch is normalised: its input, its output, both, or the sum of it and the residual stream, after
    which there is no last norm."""
    embedding_norm: bool = False
    """Normalise the embeddings."""
    unnormed: tuple[int, ...] = ()
    """Layers, counted from 0, whose attention reads the residual stream as it is, for all of `norms`."""
    causal: bool = True
    """Tokens see earlier ones only; an encoder's see all."""
    encoder_layers: int = 0
    """Of an encoder as wide as the decoder, which the decoder's layers attend to; 0: there is none."""
    start_token: int = 0
    """The token that a decoder beside an encoder begins with."""
    parallel: bool = False
    """Attention and mlp read the same text, and both are added to it at once."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    positions: Literal["rope", "learned", "sinusoidal", "alibi", "relative"] = "rope"
    """Rotary angles, a learned or a fixed embedding, or biases on scores by distance: ALiBi's, T5's learned ones."""
    first_position: int = 0
    """The row of the learned table that the first token has."""
    relative_buckets: int = 32
    """How many distances `relative` tells apart."""
    relative_distance: int = 128
    """Beyond this all distances are one."""
    rope: Rope = Rope()
    unrotated: tuple[int, ...] = ()
    """Layers, counted from 0, whose queries and keys are left unrotated: they know no positions."""
    windows: tuple[int, ...] = ()
    """How many tokens each layer sees, itself counted; 0 is all. Empty: all layers see all."""
    local_rope: Rope | None = None
    """Of the layers that have a window; None is that of the others."""
    attention_scale: float | None = None
    """Factor on the scores; None is one over the root of head_width."""
    attention_soft_cap: float | None = None
    """c in ``c·tanh(score/c)``."""
    qkv_bias: bool = False
    out_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    """A bias in the mlps, and in the head's transform."""
    qk_norm: Literal["none", "head", "heads"] = "none"
    """Over what queries and keys are normalised before they are rotated: each head's width, or all heads at once."""
    experts: int = 0
    """How many mlps of `mlp_width` a layer has, each token going through the few that a router picks; 0: one mlp."""
    experts_per_token: int = 2
    """How many the router picks."""
    normalise_picks: bool = True
    """Divide the probabilities of a token's experts by their sum."""
    token_types: int = 0
    """Sentences that an embedding tells apart; 0: it does not."""
    labels: int = 0
    """Classes that the head tells apart, by an example's first token; 0: it gives the vocabulary."""
    tie_head: bool = True
    """The head is the transposed embedding."""
    head_transform: Literal["none", "relu", "tanh", "silu", "gelu", "gelu_tanh"] = "none"
    """Activation of a dense layer between the last layer and the head."""
    head_norm: bool = False
    """A norm between that and the head."""
    head_bias: bool = False
    head_scale: float | None = None
    """Factor on the logits; None is 1."""
    head_soft_cap: float | None = None
    """c in ``c·tanh(logit/c)``."""
    scale_embedding: bool = False
    """Multiply embeddings by the root of the width."""
    dropout: float = 0.0
    """Rate on the embedding and on both residual branches, in training only."""

    @property
    def task(self) -> Task:
        """What it can be trained for; an encoder without a head gives embeddings."""
        if self.encoder_layers:
            return "seq2seq"
        if self.causal:
            return "causal_lm"
        if self.labels:
            return "classification"
        return "embedding" if self.head_transform == "none" else "masked_lm"

    @property
    def why_no_prefix(self) -> str:
        """Why keys and values of a text's beginning are not the same whatever follows; empty where they are."""
        if self.encoder_layers:
            return "it is an encoder-decoder, whose decoder reads its prompt through the encoder"
        if not self.causal:
            return "it is an encoder, where what comes first sees what follows"
        ropes = (self.rope, self.local_rope if self.windows else None) if self.positions == "rope" else ()
        if any(rope is not None and rope.scaling == "dynamic" for rope in ropes):
            return "its rotary angles (dynamic) go by the length of the whole text"
        return ""

    @property
    def why_no_gist(self) -> str:
        """Why a gist cannot stand for a prompt of any length; empty where it can."""
        if not self.why_no_prefix and self.positions in ("learned", "sinusoidal"):
            return f"its positions are {self.positions}: counted from the start of the prompt, which is to be left out"
        return self.why_no_prefix

    def check_gist(self) -> None:
        """Check that it takes a gist.

        Raises:
            UserError: it takes none.
        """
        if self.why_no_gist:
            raise UserError(f"the model takes no gist: {self.why_no_gist}; set student.gist to 0")

    def check_prefix(self) -> None:
        """Check that it takes a prefix.

        Raises:
            UserError: it takes none.
        """
        if self.why_no_prefix:
            raise UserError(f"the model takes no prefix: {self.why_no_prefix}; put the prompt into each row")

    def __post_init__(self) -> None:
        """Check what no Transformer can be built from."""
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; wanted at least 1")
        for name in ("layers", "encoder_layers", "experts"):
            if getattr(self, name) > MOST:
                raise UserError(f"{name} is {getattr(self, name)}; wanted at most {MOST:,}")
        if self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} does not divide by kv_heads {self.kv_heads}")
        rotated, least = self.rope.width(self.head_width), 4 if self.rope.scaling == "dynamic" else 2
        if self.positions == "rope" and (rotated % 2 or rotated < least):
            raise UserError(
                f"head_width is {self.head_width}, of which {rotated} are rotated; wanted an even number from {least}"
            )
        for name in ("unrotated", "unnormed"):
            if not all(0 <= layer < self.layers for layer in getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}; wanted layers from 0 to {self.layers - 1}")
        if self.experts < 0 or (self.experts and not 1 <= self.experts_per_token <= self.experts):
            raise UserError(
                f"experts is {self.experts} and experts_per_token {self.experts_per_token}; "
                "wanted from 1 to experts, or no experts"
            )
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise UserError(f"windows is {self.windows}; wanted {self.layers}, one for each layer, each from 0")
        for name in ("encoder_layers", "start_token", "first_position", "token_types", "labels"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; wanted at least 0")
        if self.labels and self.tie_head:
            raise UserError(f"labels is {self.labels} and tie_head is True; a classifier's head cannot be tied")
        if self.encoder_layers and not self.causal:
            raise UserError("encoder_layers is set and causal is False; the decoder of an encoder-decoder is causal")
        if self.positions == "relative" and not 4 <= self.relative_buckets // 2 < self.relative_distance:
            raise UserError(
                f"relative_buckets is {self.relative_buckets} and relative_distance {self.relative_distance}; "
                "wanted at least 8 buckets, and fewer than twice the distance"
            )
        if self.attention_soft_cap is not None and self.positions in ("alibi", "relative"):
            raise UserError(f"attention_soft_cap cannot go with positions {self.positions!r}; leave out one")
        for name in ("attention_scale", "attention_soft_cap", "head_soft_cap", "head_scale"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} is {value}; wanted more than 0, or None")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; wanted from 0 to below 1")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: to a kernel W is added α/rank·a·b, and only a and b are trained; merged when exported."""

    rank: int = 0
    """Columns of a, rows of b; 0: no adapters."""
    alpha: float = 16.0
    """α."""
    targets: tuple[str, ...] = ("q", "k", "v", "out", "gate", "up", "down")
    """The matrices that get one, in every layer: those of attention (q, k, v, out) and of mlps (gate, up, down)."""

    def __post_init__(self) -> None:
        """Check what no adapter can be made of."""
        if self.rank < 0 or not self.alpha > 0:
            raise UserError(
                f"lora.rank is {self.rank} and lora.alpha {self.alpha}; wanted a rank from 0 and an alpha above 0"
            )


SOFT_PROMPT = "soft_prompt"
"""The branch of a model's parameters that its soft prompt is."""

GIST = "gist"
"""The branch of a model's parameters that the vectors of its gist places are."""


@dataclass(frozen=True)
class SoftPrompt:
    """A few trained vectors before every example, nothing else of the student being trained."""

    tokens: int = 0
    """How many; 0: none; -1, with `start` prompt: as many as the text has tokens."""
    kind: Literal["prompt", "prefix"] = "prompt"
    """Vectors in the place of embeddings (prompt tuning), or keys and values of every layer (prefix tuning)."""
    start: Literal["random", "vocabulary", "prompt"] = "vocabulary"
    """Random vectors, or what random tokens, or the tokens of `text`, have: their embeddings, or keys and values."""
    text: str = ""
    """With `start` prompt: a text as it stands before the student's view, or @FILE. Of one with more than `tokens`
    tokens the last ones are kept, and the first."""

    def __post_init__(self) -> None:
        """Check what no soft prompt can be made of."""
        if self.tokens < -1 or (self.tokens == -1 and self.start != "prompt"):
            raise UserError(
                f"soft_prompt.tokens is {self.tokens} and soft_prompt.start {self.start!r}; wanted at least 0, or -1 "
                "with start 'prompt'"
            )
        if self.tokens and (self.start == "prompt") != bool(self.text):
            raise UserError(
                f"soft_prompt.start is {self.start!r} and soft_prompt.text {self.text[:40]!r}; wanted a text with "
                "start 'prompt', and none with another"
            )


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and how it is run."""

    source: str = "random"
    """`random` (then `architecture` says what), `teacher` (a student cut from its teacher), a known name such as
    smollm2-135m-instruct, a directory in Hugging Face's format, a .gguf file, a run directory, or a hub id."""
    keep_layers: tuple[int, ...] = ()
    """Which layers of the source to keep, in order, counted from 0; empty keeps all."""
    keep_encoder_layers: tuple[int, ...] = ()
    """The same for the encoder beside a decoder."""
    dtype: DType = "float32"
    """Of the computation; parameters that are trained stay float32."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matmuls with weights (`dots`), or whole layers (`full`)."""
    quantize: Quantize = "none"
    """Of a teacher: keep its matrices in 8 bits, or in 4 with 8 for embedding and head; computed in `dtype`."""
    offload: bool = False
    """Of a teacher: keep the weights of its layers in the host's memory; each layer comes to the chips for its turn."""
    lora: Lora = Lora()
    """Of a student: train adapters, and nothing else unless `trained` says so."""
    trained: tuple[str, ...] = ()
    """Of a student: beginnings of the paths of the parameters that are trained (`layers/mlp`, `final_norm`), the others
    being frozen. Empty: all of them, or with `lora` none."""
    soft_prompt: SoftPrompt = SoftPrompt()
    """Of a student: train what stands before every example, and nothing else."""
    gist: int = 0
    """Of a student: so many trained vectors stand where `data.student_view` says {{ gist }}, and what comes after them
    sees them in the place of what comes before. Trained beside adapters, or all weights; 0: none."""
    architecture: ModelConfig = ModelConfig()
    """Used only when `source` is `random`."""
