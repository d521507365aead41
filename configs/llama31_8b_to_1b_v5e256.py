"""Llama-3.1-8B distilled into Llama-3.2-1B on a slice of 256 TPU v5e chips.

COMMAND:  kdjax train configs/llama31_8b_to_1b_v5e256.py
HARDWARE: TPU v5e, 256 chips (16x16)
TIME:     not run; planned: docs/plans/llama31_8b_to_1b_v5e256.md
RESULT:   not run; planned: its step fits 256 chips, what it learns is not known
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
        name="llama31_8b_to_1b_v5e256",
        teacher=ModelSpec(source="meta-llama/Llama-3.1-8B", dtype="bfloat16"),
        student=ModelSpec(source="meta-llama/Llama-3.2-1B", dtype="bfloat16", remat="full"),
        data=DataConfig(sources=("parquet:data/*.parquet",), sequence_length=2048, dedupe_ngram=0),
        objective=ObjectiveConfig(alpha=0.1),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=200, b2=0.95, weight_decay=0.1),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=500),
        steps=10_000,
        batch_size=512,
        eval_every=500,
    )
