"""Prompts never seen, each compressed in one pass: of 72 words that a text begins with, 8 places are kept.

COMMAND:  kdjax train configs/gist.py
HARDWARE: 1 CPU core, 6 GB of memory; no GPU
TIME:     about 16 minutes beside other work, once the model (93 MB) is fetched (figures: docs/prompts.md)
RESULT:   a share of unseen prompts' effect is recovered, but nearly as much behind another prompt's gist: so few steps
          teach the kind of text, and little yet of each prompt (figures: docs/prompts.md)
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.models.config import Lora
from kdjax.optim import OptimConfig
from kdjax.sampling import AnswersConfig


def get_config() -> Config:
    return Config(
        name="gist",
        teacher=ModelSpec(source="smollm2-135m-instruct"),
        student=ModelSpec(source="teacher", lora=Lora(rank=16), gist=8),
        data=DataConfig(
            sources=("python_passages",),
            student_view="{{ document }}{{ gist }}{{ prompt }}",
            teacher_view="{{ document }}{{ prompt }}",
            packing="first_fit",
            sequence_length=512,
            group_field="module",
            eval_fraction=0.08,
            eval_tokens=8192,
            max_bad_rows=100,
        ),
        answers=AnswersConfig(tokens=24, unrelated=()),
        objective=ObjectiveConfig(alpha=0.0, temperature=1.0, chunk_tokens=256),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=5, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=20, keep=1, keep_best=False),
        steps=40,
        batch_size=2,
        eval_every=0,
        notes=('Next: kdjax generate runs/gist --compress @FILE --prompt " It is"',),
    )
