"""A classifier distilled: two of a small BERT's four layers, taught by what all four say of each class.

COMMAND:  kdjax train configs/classifier.py
HARDWARE: 2 CPU cores; no GPU, no network
TIME:     about a minute, after kdjax train configs/pretrain_classifier.py has made the teacher
RESULT:   held-out KL to the teacher falls (`python -m benchmarks.kinds` measures it)
"""

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="classifier",
        teacher=ModelSpec(source="runs/pretrain_classifier"),
        student=ModelSpec(source="teacher", keep_layers=(0, 3)),
        data=DataConfig(packing="first_fit", sequence_length=256, eval_tokens=65_536),
        objective=ObjectiveConfig(alpha=0.0),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=10),
        steps=150,
        batch_size=16,
        eval_every=50,
    )
