"""A student that reads bytes, taught by a teacher of another tokenizer: chunks of text are compared (ALM).

COMMAND:  kdjax train configs/byte_student.py
HARDWARE: 2 CPU cores, 4 GB of memory; no GPU
TIME:     about 6 minutes (estimated) once the teacher (93 MB) is fetched
RESULT:   held-out bits a byte beside training without a teacher: docs/teachers.md
PAPER:    Minixhofer et al. 2025, arXiv:2503.20083
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelConfig, ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="byte_student",
        teacher=ModelSpec(source="smollm2-135m-instruct"),
        student=ModelSpec(
            architecture=ModelConfig(
                vocab_size=260, width=256, layers=6, heads=4, kv_heads=2, head_width=64, mlp_width=704
            )
        ),
        data=DataConfig(
            sources=("python_docs",),
            tokenizer="bytes",
            teacher_tokenizer="own",
            packing="first_fit",
            sequence_length=512,
            teacher_length=192,
            eval_tokens=32_768,
        ),
        objective=ObjectiveConfig(alpha=0.5, divergence="alm", chunk_tokens=256),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=10),
        checkpoint=CheckpointConfig(every=50, keep=1, keep_best=False),
        steps=100,
        batch_size=4,
        prompt="Return the",
        prompt_tokens=60,
        notes=("Two ways more: --objective.divergence uld, or forward_kl of the teacher projected onto bytes.",),
    )
