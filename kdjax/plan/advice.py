"""What to change in a config whose step does not fit: each line only where it applies."""

from __future__ import annotations

from typing import Any

from kdjax.job import Job
from kdjax.plan.estimate import Sizes


def advice(job: Job, plan: dict[str, Any], sizes: Sizes) -> list[str]:
    """Return what would make the step of a plan smaller, what saves most for least time first."""
    config, mesh, memory = job.config, plan["mesh"], plan["memory"]
    held = memory["teacher"] + memory["student"] + memory["optimizer"]
    heavy = held > memory["limit"] / 3  # what stays through the step is much of it
    copies, rows = mesh["data"], config.batch_size // (job.place.batch_devices * config.microbatches)
    experts = job.student.model.config.experts or (job.teacher is not None and job.teacher.model.config.experts)
    teacher = config.teacher
    lines = {
        "set objective.implementation to chunked: now the logits of all tokens exist at once": (
            config.objective.implementation == "reference" and config.objective.logits
        ),
        f"split parameters further: mesh.fsdp {mesh['fsdp'] * copies} with mesh.data 1": (
            heavy and copies > 1 and job.place.by == "jit"
        ),
        "set mesh.placement to jit, with mesh.fsdp: pmap copies all parameters to each device": job.place.by == "pmap",
        "keep the teacher in bfloat16 (teacher.dtype), half its bytes": (
            teacher is not None
            and teacher.dtype == "float32"
            and job.teacher is not None
            and job.teacher.file is not None
        ),
        "keep the teacher in 8 bits (teacher.quantize int8)": (
            heavy
            and teacher is not None
            and teacher.quantize == "none"
            and job.teacher is not None
            and job.teacher.file is not None
            and memory["teacher"] > memory["limit"] / 5
        ),
        "compute again what the backward pass needs: student.remat full": config.student.remat != "full",
        f"raise microbatches, to {config.microbatches * 2} first: fewer tokens at one time, the same result": rows > 1,
        "lower data.sequence_length: a device has one row at one time": rows == 1,
        "split rows: mesh.context 2 or more": rows == 1 and mesh["context"] == 1 and plan["devices"] > 1,
        "split heads, mlps and vocabulary: mesh.tensor 2 or more": mesh["tensor"] == 1 and plan["devices"] > 1,
        f"lower objective.chunk_tokens below {sizes.chunk}, whose logits take "
        f"{sizes.chunk * sizes.columns * 16 / 2**30:.1f} GiB": (
            config.objective.implementation == "chunked" and sizes.chunk * sizes.columns * 16 > memory["limit"] / 8
        ),
        "compute in bfloat16: student.dtype": config.student.dtype == "float32",
        "split the experts: mesh.expert": bool(experts) and mesh["expert"] == 1,
        "train adapters alone: student.lora.rank": heavy and job.student.is_whole and job.student.file is not None,
        "take more chips, or chips with more memory": heavy and copies == 1,
    }
    return [line for line, applies in lines.items() if applies]
