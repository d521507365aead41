"""SmolLM2-1.7B distilled into SmolLM2-360M on one H100 GPU.

COMMAND:  kdjax train configs/smollm2_1p7b_to_360m_1gpu.py
HARDWARE: one NVIDIA H100 (80 GB)
TIME:     not run; planned: docs/plans/smollm2_1p7b_to_360m_1gpu.md
RESULT:   not run; planned: its step fits the GPU, what it learns is not known
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="smollm2_1p7b_to_360m_1gpu",
        teacher=ModelSpec(source="HuggingFaceTB/SmolLM2-1.7B", dtype="bfloat16"),
        student=ModelSpec(source="HuggingFaceTB/SmolLM2-360M", dtype="bfloat16", remat="full"),
        data=DataConfig(sources=("parquet:data/*.parquet",), sequence_length=2048, dedupe_ngram=0),
        objective=ObjectiveConfig(alpha=0.1),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=200, b2=0.95, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=500),
        steps=10_000,
        batch_size=64,
        microbatches=4,
        eval_every=500,
    )
