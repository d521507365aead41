"""Pre-train a small model from nothing on the text that every Python carries; a run can be a teacher afterwards.

COMMAND:  kdjax train configs/pretrain_tiny.py
HARDWARE: 2 CPU cores; no GPU, no network
TIME:     about 3 minutes
RESULT:   perplexity per byte on held-out text falls from about 260 to below 10
NEXT:     kdjax train configs/smoke.py --teacher.source runs/pretrain_tiny --run-dir runs/from_tiny
"""

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.models import ModelConfig, ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="pretrain_tiny",
        student=ModelSpec(
            architecture=ModelConfig(
                vocab_size=264, width=128, layers=4, heads=4, kv_heads=2, head_width=32, mlp_width=352
            )
        ),
        data=DataConfig(sources=("python_docs",), tokenizer="bytes", sequence_length=256, eval_tokens=16_384),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=30, weight_decay=0.1),
        steps=300,
        batch_size=16,
        eval_every=100,
        prompt="The import statement",
        prompt_tokens=100,
        notes=(
            "Next, let it teach: "
            "kdjax train configs/smoke.py --teacher.source runs/pretrain_tiny --run-dir runs/from_tiny",
        ),
    )
