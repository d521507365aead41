"""Distillation of inner layers too: hidden states through learned projections, and relations of attention.

COMMAND:  kdjax train configs/features.py
HARDWARE: any CPU
TIME:     about 30 seconds, most of it compiling
RESULT:   nothing worth keeping, both models being random; hidden_mse and the three relations fall beside the KL
"""

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import Feature, ObjectiveConfig
from kdjax.models import ModelConfig, ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    last = ((1, 3),)  # student layer, teacher layer
    return Config(
        name="features",
        teacher=ModelSpec(architecture=ModelConfig(vocab_size=264, width=64, layers=4, mlp_width=192)),
        student=ModelSpec(
            architecture=ModelConfig(vocab_size=264, width=32, layers=2, heads=2, kv_heads=1, mlp_width=64)
        ),
        data=DataConfig(tokenizer="bytes", sequence_length=128, eval_tokens=4096),
        objective=ObjectiveConfig(
            alpha=0.0,
            temperature=2.0,
            features=(
                Feature("hidden_mse", weight=10.0),  # layers spread evenly: 0 onto 1, 1 onto 3
                Feature("relation_qq", weight=10.0, layers=last, relation_heads=4),
                Feature("relation_kk", weight=10.0, layers=last, relation_heads=4),
                Feature("relation_vv", weight=10.0, layers=last, relation_heads=4),
            ),
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
        steps=40,
        batch_size=8,
        notes=(
            "Both models were random: this run shows that everything works, and nothing else.",
            "Relations need no projection: they compare tokens with tokens. One pair of layers is enough for them.",
        ),
    )
