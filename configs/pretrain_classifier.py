"""Train a small BERT to tell what a piece of Python's documentation is of, to teach configs/classifier.py.

The classes: a topic of the manual, a module, a class, a function.

COMMAND:  kdjax train configs/pretrain_classifier.py
HARDWARE: 2 CPU cores; no GPU, no network
TIME:     about 2 minutes
RESULT:   cross entropy on held-out texts falls from ln 4 = 1.39 nats (`python -m benchmarks.kinds` measures it)
NEXT:     kdjax train configs/classifier.py
"""

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.models import ModelConfig, ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="pretrain_classifier",
        student=ModelSpec(
            architecture=ModelConfig(
                family="bert",
                vocab_size=264,
                width=128,
                layers=4,
                heads=4,
                kv_heads=4,
                head_width=32,
                mlp_width=512,
                max_positions=512,
                norm="layer",
                norm_eps=1e-12,
                norms="sum",
                embedding_norm=True,
                causal=False,
                activation="gelu",
                gated_mlp=False,
                positions="learned",
                qkv_bias=True,
                out_bias=True,
                mlp_bias=True,
                token_types=2,
                labels=4,
                tie_head=False,
                head_transform="tanh",
                head_bias=True,
            )
        ),
        data=DataConfig(tokenizer="bytes", packing="first_fit", sequence_length=256, eval_tokens=65_536),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=30, weight_decay=0.01),
        steps=300,
        batch_size=16,
        eval_every=100,
    )
