"""A student of bytes taught by a teacher of another tokenizer, in each way there is: bits a byte beside steps.

COMMAND: python -m benchmarks.tokenizers             (about 25 minutes on 2 CPU cores; run again to go on)
         python -m benchmarks.tokenizers --arms ALM  (a part of it)

The recipe is configs/byte_student.py: the same student, rows, steps and learning rate for all, and the cross entropy
to the bytes weighs the same where there is a teacher. Rows, each with its curve, go to
benchmarks/results/tokenizers.jsonl, of which docs/tokenizers.svg is drawn; `python -m benchmarks.readme` makes the
table of docs/teachers.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks import harness, runs
from kdjax import config as configs
from kdjax.config import Config
from kdjax.console import percent
from kdjax.data.python_docs import documents
from kdjax.models import ModelSpec

RECIPE = harness.ROOT / "configs" / "byte_student.py"


def _base(home: Path, is_quick: bool) -> Config:
    config = configs.load(str(RECIPE))
    config = replace(config, prompt="", eval_every=config.steps // 5)
    return _quick(config, home) if is_quick else config


def _quick(config: Config, home: Path) -> Config:
    """Return a trial: a teacher of random weights with a small tokenizer of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator((row["text"] for row in documents()[:200]), trainer)
    backend.save(str(home / "tokenizer.json"))
    small = replace(config.student.architecture, width=32, layers=1, mlp_width=64)
    data = replace(config.data, teacher_tokenizer=str(home / "tokenizer.json"))
    data = replace(data, sequence_length=128, teacher_length=128, eval_tokens=512)
    teacher = ModelSpec(architecture=replace(small, vocab_size=512))
    student = replace(config.student, architecture=small)
    optim = replace(config.optim, warmup_steps=1)
    return replace(config, data=data, teacher=teacher, student=student, optim=optim, steps=2, eval_every=0)


def _of(config: Config, run: Path, **parts: object) -> Config:
    return replace(config, objective=replace(config.objective, **parts))


ARMS: dict[str, Callable[[Config, Path], Config]] = {
    "cross entropy alone": partial(_of, alpha=1.0),
    "ALM": _of,
    "ALM, τ = 1": partial(_of, divergence="alm(tau=1)"),
    "projected, forward KL": partial(_of, divergence="forward_kl"),
    "ULD": partial(_of, divergence="uld"),
}

STUDY = runs.Study(
    name="tokenizers",
    doc=__doc__ or "",
    base=_base,
    arms=ARMS,
    columns={
        "held-out bits a byte": lambda row: f"{row['ce_after'] / math.log(2):.3f}",
        "KL from the projected teacher (nats)": lambda row: f"{row['kl_before']:.3f} → {row['kl_after']:.3f}",
        "the same likeliest byte": lambda row: percent(row["agreement_after"]),
        "a step": lambda row: f"{row['step_seconds']:.2f} s",
    },
    curve=("eval_ce", "held-out cross entropy, nats a byte"),
    about=lambda row: (
        f"{row['steps']} steps of `configs/byte_student.py`, one run each at one learning rate; KL and agreement where "
        "both models have a border."
    ),
)

if __name__ == "__main__":
    runs.run(STUDY)
