"""Pre-train a small T5 from nothing on the text that every Python carries, to teach configs/seq2seq.py.

COMMAND:  kdjax train configs/pretrain_seq2seq.py
HARDWARE: 2 CPU cores; no GPU, no network
TIME:     about 2 minutes
RESULT:   perplexity of a byte of how held-out text goes on falls from about 260
NEXT:     kdjax train configs/seq2seq.py
"""

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.models import ModelConfig, ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        name="pretrain_seq2seq",
        student=ModelSpec(
            architecture=ModelConfig(
                family="t5",
                vocab_size=264,
                width=128,
                layers=4,
                encoder_layers=4,
                heads=4,
                kv_heads=4,
                head_width=32,
                mlp_width=256,
                max_positions=512,
                norm_eps=1e-6,
                activation="gelu_tanh",
                positions="relative",
                attention_scale=1.0,
                tie_head=False,
                start_token=256,
            )
        ),
        data=DataConfig(
            tokenizer="bytes", packing="first_fit", sequence_length=128, target_length=128, eval_tokens=16_384
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=30),
        steps=300,
        batch_size=16,
        eval_every=100,
    )
