"""An encoder-decoder distilled: half of a small T5's layers on either side, taught by all of them.

COMMAND:  kdjax train configs/seq2seq.py
HARDWARE: 2 CPU cores; no GPU, no network
TIME:     about 2 minutes, after kdjax train configs/pretrain_seq2seq.py has made the teacher
RESULT:   held-out KL to the teacher falls (`python -m benchmarks.kinds` measures it)
"""

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="seq2seq",
        teacher=ModelSpec(source="runs/pretrain_seq2seq"),
        student=ModelSpec(source="teacher", keep_layers=(0, 3), keep_encoder_layers=(0, 3)),
        data=DataConfig(packing="first_fit", sequence_length=128, target_length=128, eval_tokens=16_384),
        objective=ObjectiveConfig(alpha=0.0),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10),
        steps=150,
        batch_size=16,
        eval_every=50,
    )
