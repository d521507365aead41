"""A sentence encoder made smaller: three of all-MiniLM-L6-v2's six layers, taught by its hidden states.

COMMAND:  kdjax train configs/embedding.py
HARDWARE: 2 CPU cores, 4 GB of memory; no GPU
TIME:     about 25 minutes once the teacher (84 MB) is fetched
RESULT:   similarities of pairs of held-out texts keep the teacher's order: Spearman above 0.95 (docs/models.md)
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import Feature, ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    inner, last = (
        ((0, 1), (1, 3)),
        ((2, 5),),
    )  # student layer, teacher layer; a sentence's vector is the mean of the last
    return Config(
        name="embedding",
        teacher=ModelSpec(source="all-minilm-l6-v2"),
        student=ModelSpec(source="teacher", keep_layers=(0, 3, 5)),
        data=DataConfig(sequence_length=64, eval_tokens=16_384),
        objective=ObjectiveConfig(
            logits=False,
            features=(
                Feature("hidden_mse", weight=10.0, layers=last),
                Feature("hidden_cosine", layers=last),
                Feature("hidden_mse", weight=10.0, layers=inner),
            ),
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=20),
        checkpoint=CheckpointConfig(every=500, keep=1, keep_best=False),
        steps=4000,
        batch_size=16,
        eval_every=1000,
        notes=("Next: kdjax export runs/embedding OUT, which sentence-transformers and transformers load.",),
    )
