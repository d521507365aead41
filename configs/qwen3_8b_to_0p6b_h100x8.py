"""Qwen3-8B distilled into Qwen3-0.6B on one node of 8 H100 GPUs.

COMMAND:  kdjax train configs/qwen3_8b_to_0p6b_h100x8.py
HARDWARE: 8 NVIDIA H100 (SXM, 80 GB), one node
TIME:     not run; planned: docs/plans/qwen3_8b_to_0p6b_h100x8.md
RESULT:   not run; planned: its step fits the node, what it learns is not known
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.optim import OptimConfig
from kdjax.sharding import MeshConfig


def get_config() -> Config:
    return Config(
        name="qwen3_8b_to_0p6b_h100x8",
        teacher=ModelSpec(source="Qwen/Qwen3-8B", dtype="bfloat16"),
        student=ModelSpec(source="Qwen/Qwen3-0.6B", dtype="bfloat16", remat="full"),
        data=DataConfig(sources=("parquet:data/*.parquet",), sequence_length=4096, dedupe_ngram=0),
        objective=ObjectiveConfig(alpha=0.1),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=200, b2=0.95, weight_decay=0.1),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=500),
        steps=10_000,
        batch_size=64,
        microbatches=2,
        eval_every=500,
    )
