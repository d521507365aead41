"""How much of a machine a run uses: FLOPs that its steps need, against what its chips can do."""

from __future__ import annotations

import re
from typing import Any

from kdjax.job import Job
from kdjax.plan.chips import CHIPS
from kdjax.plan.flops import Flops, step_flops

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p?": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU ?7x": "v7x",
    "NVIDIA H100 .*HBM3": "H100",
    "NVIDIA H200.*": "H200",
}
"""What jax calls a kind of device, as a pattern -> the row of `CHIPS` that it is; others have no known peak."""


def peak(device_kind: str, dtype: str) -> float:
    """Return the FLOP/s of matmuls that a device of a kind can do; 0 is not known."""
    rows = (CHIPS[model] for pattern, model in KINDS.items() if re.fullmatch(pattern, device_kind))
    return next((getattr(chip, dtype) / chip.devices for chip in rows), 0.0)


def flops_of(job: Job) -> Flops:
    """Return the FLOPs of a job's step; a teacher whose says come from a cache has none."""
    teachers = job.teachers if job.runs_teacher else {}
    return step_flops(job.config, job.student.model.config, *(one.model.config for one in teachers.values()))


def teachers_share(flops: Flops) -> float:
    """Return the teacher's share of a step's FLOPs; its head's product counts for the loss."""
    return flops.teacher / flops.done


def utilisation(job: Job, flops: Flops, tokens_per_second: float) -> dict[str, float]:
    """Return what a rate of tokens is in FLOP/s of a device, and as a share of its peak where that is known.

    Returns:
        `model_flops_per_second`: what the models' mathematics needs, a device and second. `mfu`: its share of the peak
        in the student's dtype (Chowdhery et al., 2022, appendix B). `hfu`: with what is masked or computed again.
    """
    config, devices = job.config, job.devices
    steps_per_second = tokens_per_second / (config.batch_size * config.data.sequence_length) / len(devices)
    most = peak(devices[0].device_kind, job.student.spec.dtype)
    found = {"model_flops_per_second": flops.useful * steps_per_second}
    shares: dict[str, Any] = {"mfu": flops.useful, "hfu": flops.done} if most else {}
    return found | {name: amount * steps_per_second / most for name, amount in shares.items()}
