"""A real language model distilled on a laptop: 12 of SmolLM2-135M-Instruct's 30 layers, taught by all 30.

COMMAND:  kdjax train configs/quickstart.py
HARDWARE: 2 CPU cores, 4 GB of memory; no GPU
TIME:     about 5 minutes once the teacher (93 MB) is fetched
RESULT:   held-out KL to the teacher falls from about 10 nats to below a quarter of that (figures: README)
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="quickstart",
        teacher=ModelSpec(source="smollm2-135m-instruct"),
        student=ModelSpec(source="teacher", keep_layers=(0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 29)),
        data=DataConfig(sources=("python_docs",), sequence_length=256, eval_tokens=16_384),
        objective=ObjectiveConfig(alpha=0.0, temperature=1.0, chunk_tokens=256),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=4, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=16, keep=1, keep_best=False),
        steps=32,
        batch_size=4,
        prompt="The for statement is used to",
        prompt_tokens=40,
        notes=(
            "Why its text is still rough: 32 steps are 32,768 tokens; a distillation worth keeping reads hundreds of "
            "millions. A longer run goes on closing the gap: add --steps 2000 --run-dir runs/longer.",
            "Next: kdjax generate runs/quickstart --prompt 'A list is'",
        ),
    )
