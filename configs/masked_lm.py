"""An encoder distilled at the tokens it has to find: two of a small BERT's four layers, taught by all four.

COMMAND:  kdjax train configs/masked_lm.py
HARDWARE: 2 CPU cores; no GPU, no network
TIME:     about a minute, after kdjax train configs/pretrain_masked_lm.py has made the teacher
RESULT:   held-out KL to the teacher falls, and training on the text alone raises it (figures: docs/models.md)
"""

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="masked_lm",
        teacher=ModelSpec(source="runs/pretrain_masked_lm"),
        student=ModelSpec(source="teacher", keep_layers=(0, 3)),
        data=DataConfig(sequence_length=128, eval_tokens=16_384),
        objective=ObjectiveConfig(alpha=0.0),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10),
        steps=150,
        batch_size=16,
        eval_every=50,
    )
