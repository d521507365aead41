"""FLOPs of a step, counted matmul by matmul: 2 for each multiplication with its addition, and nothing else.

Compilers count a loop's body once, so their figure of a scanned step is no use. Elementwise work (norms, softmax,
rotary angles, the optimiser) is left out: a few per cent of a small model, less of a large one.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdjax.config import Config
from kdjax.models import ModelConfig, ModelSpec
from kdjax.models.transformer import encoder_config


@dataclass(frozen=True)
class Forward:
    """FLOPs of a forward pass up to the head.

    Attributes:
        weights: of matmuls with weights.
        attention: of scores and weighted values, between all tokens of a row: XLA computes those that are masked too.
        seen: of these, between tokens that see each other: half under a causal mask, less with windows.
    """

    weights: float
    attention: float
    seen: float


def layer_weights(c: ModelConfig) -> int:
    """Return the multiplications with weights that a token takes in a layer; an expert's only where it is picked."""
    attention = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
    mlp = c.width * c.mlp_width * (3 if c.gated_mlp or c.experts else 2)
    return attention + (mlp * c.experts_per_token + c.width * c.experts if c.experts else mlp)


def seen_pairs(c: ModelConfig, tokens: int) -> float:
    """Return how many pairs of tokens of a row, all layers added up, see each other."""
    total = 0.0
    for window in c.windows or (0,) * c.layers:
        reach = min(window or tokens, tokens)  # itself counted
        behind = reach * tokens - reach * (reach - 1) / 2
        total += behind if c.causal else 2 * behind - tokens
    return total


def forward(c: ModelConfig, rows: int, tokens: int, encoder_tokens: int = 0) -> Forward:
    """Return the FLOPs of rows that are full; documents packed into one row see even less of each other."""
    n, heads = rows * tokens, c.heads * c.head_width
    weights = 2.0 * n * c.layers * layer_weights(c)
    weights += 2.0 * n * c.width**2 * (c.head_transform != "none")
    attention, seen = (4.0 * rows * heads * pairs for pairs in (c.layers * tokens**2, seen_pairs(c, tokens)))
    if not c.encoder_layers:
        return Forward(weights, attention, seen)
    encoder = forward(encoder_config(c), rows, encoder_tokens)
    cross = 4.0 * rows * heads * c.layers * tokens * encoder_tokens
    kv = 2 * c.kv_heads * c.head_width * encoder_tokens
    weights += 2.0 * rows * c.layers * c.width * (2 * heads * tokens + kv)
    return Forward(weights + encoder.weights, attention + cross + encoder.attention, seen + cross + encoder.seen)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step, all chips and microbatches added up.

    Attributes:
        teacher: its forward pass.
        student: its forward and backward pass.
        recompute: what `remat` makes the backward pass compute again.
        loss: the heads' products 2·N·V·(D_s + D_t), and the gradients' 4·N·V·D_s.
        useful: of all of it, without what is masked or computed again: what MFU is counted by.
    """

    teacher: float
    student: float
    recompute: float
    loss: float
    useful: float

    @property
    def done(self) -> float:
        """What the chips compute."""
        return self.teacher + self.student + self.recompute + self.loss


RECOMPUTED = {"none": (0, 0), "dots": (0, 1), "full": (1, 1)}
"""`ModelSpec.remat` -> how often the backward pass computes matmuls with weights, and attention, again."""


def step_flops(config: Config, student: ModelConfig, *teachers: ModelConfig) -> Flops:
    """Return the FLOPs of a step; attention is counted whole where it is done, and by its mask where it is useful."""
    data, rows = config.data, config.batch_size
    tokens = (data.target_length or data.sequence_length) if student.encoder_layers else data.sequence_length
    own = forward(student, rows, tokens, data.sequence_length)
    backward = 1 + trained_share(config.student)  # gradients of inputs, and of the weights that are trained
    trained = (1 + backward) * own.weights
    again = RECOMPUTED[config.student.remat]
    recompute = again[0] * (own.weights - _unread(student, rows * tokens)) + again[1] * own.attention
    columns = student.labels or student.vocab_size
    head = 2.0 * rows * tokens * columns if config.objective.logits else 0.0
    loss, taught, taught_seen = 3 * head * student.width, 0.0, 0.0
    for teacher in teachers if config.objective.needs_teacher else ():
        length = (data.teacher_length or tokens) if data.has_teacher_rows else tokens
        its = forward(teacher, rows, length, data.sequence_length)
        taught, taught_seen = taught + its.weights + its.attention, taught_seen + its.weights + its.seen
        loss += (2.0 * rows * length * teacher.vocab_size if data.teacher_tokenizer else head) * teacher.width
    return Flops(
        teacher=taught,
        student=trained + 3 * own.attention,
        recompute=recompute,
        loss=loss,
        useful=taught_seen + trained + 3 * own.seen + loss,
    )


def _unread(c: ModelConfig, tokens: int) -> float:
    """Return the FLOPs whose result no gradient needs: each layer's last matmul, where it is added as it is."""
    is_last = not c.experts and c.norms == "before" and not c.parallel
    return 2.0 * tokens * c.layers * c.mlp_width * c.width if is_last else 0.0


def trained_share(spec: ModelSpec) -> float:
    """Return of how much of its weights a student takes the gradient: all, or with adapters alone next to nothing."""
    return 0.0 if (spec.lora.rank or spec.soft_prompt.tokens) and not spec.trained else 1.0
