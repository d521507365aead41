"""kdjax: the step of `kdjax train`, of models in files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import jax

from benchmarks.engines import gate
from benchmarks.step import Training, batch_of
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec, export
from kdjax.optim import OptimConfig
from kdjax.plan.abstract import abstract_job


def main() -> None:
    """Take steps as long as they are asked for."""
    door, asked = gate.Gate("kdjax", "jax", "jaxlib"), gate.problem()
    teacher, student = (
        ModelSpec(source=str(asked.home / name), dtype=cast(Any, asked.dtype)) for name in ("teacher", "student")
    )
    config = Config(
        name="peers",
        teacher=teacher,
        student=student,
        objective=ObjectiveConfig(alpha=0.0, temperature=1.0),
        data=DataConfig(tokenizer="bytes", sequence_length=asked.batches_NBT.shape[2]),
        optim=OptimConfig(learning_rate=asked.learning_rate, schedule="constant", b2=asked.b2, clip_norm=0.0),
        batch_size=asked.batches_NBT.shape[1],
    )
    job = abstract_job(config, jax.devices())
    batches = map(partial(batch_of, documents=1), asked.batches())
    made = Training(job, job.frozen(), next(batches), job.start())
    door.save = lambda directory: export(job.student.model.config, made.state.params["student"], Path(directory), None)
    door.turn()
    while True:
        metrics = made.step()
        made.batch = next(batches)
        door.turn(loss=float(metrics["loss"]), grad_norm=float(metrics["grad_norm"]), **gate.jax_peak(jax))


if __name__ == "__main__":
    main()
