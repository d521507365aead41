"""The whole path in seconds, without any network: a random teacher into a smaller random student.

COMMAND:  kdjax train configs/smoke.py
HARDWARE: any CPU
TIME:     about 20 seconds, most of it compiling
RESULT:   nothing worth keeping; the student's KL to its (random) teacher falls
"""

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelConfig, ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="smoke",
        teacher=ModelSpec(architecture=ModelConfig(vocab_size=264, width=64, layers=4, mlp_width=192)),
        student=ModelSpec(
            architecture=ModelConfig(vocab_size=264, width=32, layers=2, heads=2, kv_heads=1, mlp_width=64)
        ),
        data=DataConfig(tokenizer="bytes", sequence_length=128, eval_tokens=4096),
        objective=ObjectiveConfig(alpha=0.0, temperature=2.0),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
        steps=20,
        batch_size=8,
        eval_every=10,
        prompt="The import statement",
        prompt_tokens=16,
        notes=(
            "Both models were random: this run shows that everything works, and nothing else.",
            "Next, a real one: kdjax train configs/quickstart.py",
        ),
    )
