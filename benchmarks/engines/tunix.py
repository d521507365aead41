"""Tunix: `DistillationTrainer` with its logit strategy, alpha 1: of its loss the cross entropy is only reported.

Its Llama computes in the dtype of its weights, so at bfloat16 weights and moments are that too. Its rotary angles have
the base 1,000,000, whatever a config says (0.1.7), so the problem's have it.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.engines import gate

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax")


def model(home: Any, dtype: str) -> Any:
    """Return the model in a directory."""
    llama, params = (import_module(f"tunix.models.llama3.{name}") for name in ("model", "params"))
    said = json.loads((home / "config.json").read_text("utf-8"))
    config = llama.ModelConfig(
        num_layers=said["num_hidden_layers"],
        vocab_size=said["vocab_size"],
        embed_dim=said["hidden_size"],
        hidden_dim=said["intermediate_size"],
        num_heads=said["num_attention_heads"],
        head_dim=said["head_dim"],
        num_kv_heads=said["num_key_value_heads"],
        rope_theta=int(said["rope_theta"]),
        norm_eps=said["rms_norm_eps"],
        weight_tying=said["tie_word_embeddings"],
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return params.create_model_from_safe_tensors(str(home), config, mesh, dtype=jnp.dtype(dtype))


def forward(model: Any, input_tokens: Any, positions: Any, attention_mask: Any) -> Any:
    """Return the logits that have a next token: [B, T - 1, V]."""
    logits_BTV, _ = model(input_tokens, positions, None, attention_mask)
    return logits_BTV[:, :-1]


def inputs(asked: Any) -> dict[str, Any]:
    """Return what the models take of a batch."""
    tokens_BT = jnp.asarray(asked.input_tokens)
    B, T = tokens_BT.shape
    mask_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    return {"input_tokens": tokens_BT, "positions": jnp.tile(jnp.arange(T), (B, 1)), "attention_mask": mask_BTT}


class Metrics:
    """Keeps what the trainer logs; it does so a step late."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.said: dict[str, float] = {}

    def log(self, prefix: str, name: str, value: Any, *_: Any) -> None:
        """Keep it."""
        self.said[name] = float(value)

    def close(self) -> None:
        """Do nothing."""


def main() -> None:
    """Take steps as long as they are asked for."""
    door, asked = gate.Gate(*PACKAGES), gate.problem()
    trainers, logit = (import_module(f"tunix.distillation.{name}") for name in ("distillation_trainer", "strategies"))
    teacher, student = (model(asked.home / name, asked.dtype) for name in ("teacher", "student"))
    vocab = student.config.vocab_size
    strategy = logit.LogitStrategy(
        forward, forward, lambda input_tokens, **_: jax.nn.one_hot(input_tokens[:, 1:], vocab), temperature=1.0, alpha=1
    )
    trainer = trainers.DistillationTrainer(
        student,
        teacher,
        strategy,
        optax.adamw(asked.learning_rate, b2=asked.b2, weight_decay=0.0),
        trainers.TrainingConfig(eval_every_n_steps=10**9),
    ).with_gen_model_input_fn(inputs)
    trainer.metrics_logger = metrics = Metrics()

    def batches() -> Any:
        for tokens_BT in asked.batches():
            jax.block_until_ready(jax.live_arrays())
            facts = {name: metrics.said[name] for name in ("loss", "grad_norm") if name in metrics.said}
            door.turn(**facts, **gate.jax_peak(jax))
            yield trainers.TrainingInput(input_tokens=tokens_BT, input_mask=tokens_BT >= 0)

    trainer.train(batches())


if __name__ == "__main__":
    main()
