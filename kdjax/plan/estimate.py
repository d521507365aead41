"""What no compiler says: bytes of work where there is none, and the least time that a step can take on a chip.

Each time is a bound of its own: all FLOPs at the chip's peak, all bytes at its memory's rate, all that collectives
send at its links' rate. The longest is the time at best; their sum is the time if nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdjax.job import Job
from kdjax.losses.sizes import COPIES, chunk_size
from kdjax.models import ModelConfig
from kdjax.models.config import ModelSpec
from kdjax.named import Named
from kdjax.plan.chips import Machine
from kdjax.plan.flops import RECOMPUTED, Flops
from kdjax.plan.hlo import Collective
from kdjax.sharding import Placement

WIDTHS = {"float32": 4, "bfloat16": 2}
PLAIN_SCORES = 12
"""Bytes moved for each score of attention that is no one kernel: written and read in float32, then in bfloat16."""


@dataclass(frozen=True)
class Sizes:
    """What a device works on.

    Attributes:
        tokens: of a microbatch, on a device.
        microbatches: one after the other.
        length: tokens of a row.
        tensor: over how many devices heads, mlps and vocabulary are split.
        gathers: over how many devices parameters are split besides.
        chunk: tokens whose logits exist at one time.
        columns: of the vocabulary, on a device.
        is_flash: attention is one kernel, so that scores never lie in memory.
    """

    tokens: int
    microbatches: int
    length: int
    tensor: int
    gathers: int
    chunk: int
    columns: int
    is_flash: bool


def sizes_of(job: Job, kind: str, place: Placement | None = None) -> Sizes:
    """Return what a device of some kind works on, where the student lies or at a place given."""
    place = place or job.place
    config, mesh, c = job.config, dict(place.mesh.shape), job.student.model.config
    data = config.data
    length = (data.target_length or data.sequence_length) if c.encoder_layers else data.sequence_length
    tokens = config.batch_size * length // (place.batch_devices * mesh["context"] * config.microbatches)
    tensor = mesh["tensor"] if c.vocab_size % mesh["tensor"] == 0 else 1
    columns = (c.labels or c.vocab_size) // tensor
    chunk = tokens if config.objective.implementation == "reference" else chunk_size(config.objective, tokens, columns)
    flash = kind == "gpu" and config.student.dtype == "bfloat16" and c.positions not in ("alibi", "relative")
    return Sizes(tokens, config.microbatches, length, tensor, mesh["fsdp"], chunk, columns, flash)


def layer_widths(c: ModelConfig) -> int:
    """Return the numbers that a token's matmuls in a layer read and write."""
    heads, mlp = c.head_width * (2 * c.heads + 2 * c.kv_heads), c.mlp_width * (c.experts_per_token if c.experts else 1)
    return 4 * c.width + heads + (3 if c.gated_mlp or c.experts else 2) * mlp


def work_bytes(job: Job, sizes: Sizes, trained: int) -> float:
    """Return about how many bytes a device works with beside its state: right within a factor of two, seldom more.

    Args:
        job: what is planned.
        sizes: of what the device works on.
        trained: bytes of its trained parameters.
    """
    student, spec = job.student.model.config, job.student.spec
    width, has_head = WIDTHS[spec.dtype], job.config.objective.logits
    of_layer = _at_work(student, spec, sizes, 2)
    kept = {"none": of_layer, "dots": layer_widths(student) * width / sizes.tensor, "full": student.width * width}
    saved = student.layers * sizes.tokens * kept[spec.remat]
    gradient = 4 * student.width * sizes.columns if has_head else 0  # of the head, whole, from the loss on
    phases = [saved + sizes.tokens * of_layer + _gathered(student, spec, sizes) + gradient]
    head = gradient + width * student.width * sizes.columns
    if job.teacher is not None:
        phases.append(0 if job.apart else teachers_work(job.teacher, sizes))
        head += WIDTHS[job.teacher.spec.dtype] * job.teacher.model.config.width * sizes.columns
    if has_head:
        phases.append(saved + head + COPIES * 4 * sizes.chunk * sizes.columns)
    return 2 * trained + max(phases)  # gradients: those added up, and a microbatch's


def teachers_work(teacher: Named, sizes: Sizes) -> float:
    """Return about how many bytes a device works with while the teacher reads a microbatch."""
    c, spec = teacher.model.config, teacher.spec
    return sizes.tokens * _at_work(c, spec, sizes, 1) + _gathered(c, spec, sizes)


def _at_work(c: ModelConfig, spec: ModelSpec, sizes: Sizes, directions: int) -> float:
    """Return the bytes of a layer's inner values that exist at one time, for a token."""
    width = WIDTHS[spec.dtype]
    scores = 0 if sizes.is_flash else c.heads * sizes.length * (4 + width)
    return (directions * layer_widths(c) * width + scores) / sizes.tensor


def _gathered(c: ModelConfig, spec: ModelSpec, sizes: Sizes) -> float:
    """Return the bytes of a layer and the embedding, which a device gathers from those that parameters lie on."""
    whole = _layer_bytes(c, spec) + WIDTHS[spec.dtype] * c.vocab_size * c.width
    return whole / sizes.tensor if sizes.gathers > 1 else 0


def _layer_bytes(c: ModelConfig, spec: ModelSpec) -> float:
    experts = c.mlp_width * (3 if c.gated_mlp or c.experts else 2) * max(1, c.experts)
    return WIDTHS[spec.dtype] * c.width * (c.head_width * (2 * c.heads + 2 * c.kv_heads) + experts)


def moved_bytes(job: Job, sizes: Sizes, held: dict[str, int]) -> float:
    """Return about how many bytes a device reads from and writes to its memory in a step.

    Args:
        job: what is planned.
        sizes: of what the device works on.
        held: bytes of the teacher's, the student's and the optimiser's arrays on the device.
    """
    spec, c = job.student.spec, job.student.model.config
    again, width = RECOMPUTED[spec.remat], WIDTHS[spec.dtype]
    passes, gathers = 3 + again[0], sizes.gathers
    copies = 1 + (gathers > 1)  # a gathered part is written before it is read
    weights = passes * copies * held["student"] * gathers * width / 4
    moved = sizes.microbatches * (weights + 2 * held["trained"])  # gradients are added up
    moved += 2 * (held["trained"] + held["optimizer"]) + 2 * held["trained"]
    tokens = sizes.tokens * sizes.microbatches
    per_token = c.layers * passes * layer_widths(c) * width
    score = 0 if sizes.is_flash else PLAIN_SCORES * sizes.length
    per_token += c.layers * (3 + again[1]) * c.heads * score
    if job.teacher is not None and not job.apart:
        moved += teacher_moves(job, job.teacher, sizes, held["teacher"])
    moved += tokens * per_token / sizes.tensor
    if job.config.objective.logits:
        chunks = -(-sizes.tokens // sizes.chunk) * sizes.microbatches
        moved += 2 * COPIES * 4 * tokens * sizes.columns + chunks * 2 * 4 * c.width * sizes.columns
    return moved


def teacher_moves(job: Job, teacher: Named, sizes: Sizes, held: int) -> float:
    """Return about how many bytes a device reads and writes while the teacher reads a batch, `held` being its part."""
    c, gathers = teacher.model.config, sizes.gathers
    moved = sizes.microbatches * (1 + (gathers > 1)) * held * gathers
    if not job.config.objective.needs_teacher:
        return moved
    score = 0 if sizes.is_flash else PLAIN_SCORES * sizes.length
    per_token = c.layers * (layer_widths(c) * WIDTHS[teacher.spec.dtype] + c.heads * score)
    return moved + sizes.tokens * sizes.microbatches * per_token / sizes.tensor


def estimate(
    job: Job,
    machine: Machine,
    flops: Flops,
    moved: float,
    found: Sequence[Collective] | None,
    price: float | None,
    teacher: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return bounds of a step's time, and what follows of them; nothing where the chip's rates are not known.

    Args:
        job: what is planned.
        machine: what it is planned for.
        flops: of a step, all chips.
        moved: bytes to and from a device's memory.
        found: the collectives of a device; None is not known.
        price: dollars for a chip and an hour.
        teacher: `seconds` of a teacher apart, which is at the next batch meanwhile, or before where it shares devices.
    """
    chip = machine.chip
    if not chip.bfloat16:
        return {}
    of_student, chips = getattr(chip, job.student.spec.dtype), job.place.mesh.size / chip.devices
    of_teacher = getattr(chip, job.teacher.spec.dtype) if job.teacher is not None else of_student
    within = 0 if job.apart else flops.teacher / of_teacher
    seconds = bounds(machine, (within + (flops.done - flops.teacher) / of_student) / chips, moved, found)
    best, apart = max(seconds.values()), sum(seconds.values())
    if teacher:
        together = max if job.config.teacher_mesh.devices > 0 else lambda own, its: own + its
        best, apart = together(best, max(teacher.values())), together(apart, sum(teacher.values()))
        seconds["teacher"] = max(teacher.values())
    tokens = job.config.batch_size * job.config.data.sequence_length
    result: dict[str, Any] = {"seconds": seconds, "bound_by": max(seconds, key=lambda name: seconds[name])}
    for name, time in (("at_best", best), ("without_overlap", apart)):
        result[name] = {
            "seconds": time,
            "tokens_per_second": tokens / time,
            "mfu": flops.useful / (time * machine.chips * of_student),
        }
        if price is not None:
            result[name]["dollars_per_billion_tokens"] = machine.chips * price / 3600 * time / tokens * 1e9
    return result


def bounds(machine: Machine, compute: float, moved: float, found: Sequence[Collective] | None) -> dict[str, float]:
    """Return the least seconds for FLOPs, as given, for bytes to and from memory and for what collectives send."""
    chip = machine.chip
    seconds = {"compute": compute, "memory": moved * chip.devices / chip.memory_rate}
    if found is not None:
        seconds["network"] = sum(row.sent for row in found) * chip.devices / chip.network
    return seconds
