"""Whose answers a student learns from: the data's, the teacher's, its own; measured on the teacher's and on its own.

COMMAND: python -m benchmarks.answers                     (about 30 minutes on 2 CPU cores; run again to go on)
         python -m benchmarks.answers --arms "its own"    (a part of it)

The student is SmolLM2-135M-Instruct without 6 of its 30 layers, taught by all 30 on questions about Python. All ways
have the same questions, steps and learning rate. Held-out KL is measured on answers of the teacher, sampled once, and
on answers that the trained student gives to the same questions itself. Rows, each with its curve, go to benchmarks/
results/answers.jsonl, of which docs/answers.svg is drawn; `python -m benchmarks.readme` makes the table of
docs/teachers.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import harness, runs
from benchmarks.prompt_distill import sampled_once
from kdjax.answers import ANSWERS, PROGRESS, answered
from kdjax.build import build
from kdjax.config import Config
from kdjax.console import percent
from kdjax.data import DataConfig
from kdjax.evaluate import evaluate
from kdjax.losses import ObjectiveConfig, Term
from kdjax.models import ModelConfig, ModelSpec
from kdjax.on_policy import reanswered
from kdjax.optim import OptimConfig
from kdjax.sampling import AnswersConfig, Sampling

KEPT = tuple(layer for layer in range(30) if layer not in (12, 14, 16, 18, 20, 22))
QUESTION = "<|im_start|>user\n{{ prompt }}<|im_end|>\n<|im_start|>assistant\n"


def _base(home: Path, is_quick: bool) -> Config:
    """Return what all ways have: forward KL on the teacher's answers."""
    config = Config(
        name="answers",
        teacher=ModelSpec(source="smollm2-135m-instruct"),
        student=ModelSpec(source="teacher", keep_layers=KEPT),
        data=DataConfig(
            sources=("python_questions",),
            student_view=QUESTION,
            packing="first_fit",
            sequence_length=128,
            group_field="module",
            eval_fraction=0.08,
            eval_tokens=4096,
        ),
        answers=AnswersConfig(by="teacher", count=400, tokens=32, sampling=Sampling(temperature=1.0)),
        objective=ObjectiveConfig(alpha=0.0, chunk_tokens=256),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=5, weight_decay=0.0),
        steps=40,
        batch_size=4,
        eval_every=8,
    )
    return _quick(config) if is_quick else config


def _quick(config: Config) -> Config:
    small = ModelConfig(vocab_size=264, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=64)
    spec = ModelSpec(architecture=small)
    data = replace(config.data, tokenizer="bytes", sequence_length=256, eval_tokens=1024)
    answers = replace(config.answers, tokens=8, count=40)
    optim = replace(config.optim, warmup_steps=1)
    own = {"teacher": spec, "student": spec, "data": data, "answers": answers, "optim": optim}
    return replace(config, **own, steps=2, eval_every=0)


def _answers(config: Config, run: Path, **parts: object) -> Config:
    """Return a way to learn of the answers that the teacher was once asked for."""
    said = sampled_once(config, run.parent / "said")
    for name in (ANSWERS, PROGRESS):
        shutil.copyfile(said / name, run / name)
    return replace(config, **parts)


def _own(config: Config, run: Path, objective: ObjectiveConfig, **answers: object) -> Config:
    own = replace(config.answers, student_share=1.0, **answers)
    return _answers(config, run, objective=objective, answers=own)


MINILLM = ObjectiveConfig(
    alpha=0.0,
    terms=(Term("reverse_kl", token_weight="importance"), Term("likelihood_ratio", token_weight="mean_to_go")),
    chunk_tokens=256,
)
REVERSE, FORWARD = (
    ObjectiveConfig(alpha=0.0, divergence=name, chunk_tokens=256) for name in ("reverse_kl", "forward_kl")
)

ARMS: dict[str, Callable[[Config, Path], Config]] = {
    "the teacher's, as text": partial(_answers, objective=replace(FORWARD, alpha=1.0)),
    "the teacher's, forward KL": _answers,
    "the teacher's, reverse KL": partial(_answers, objective=REVERSE),
    "its own, forward KL": partial(_own, objective=FORWARD),
    "its own, reverse KL": partial(_own, objective=REVERSE),
    "its own, reverse KL, each used for 4 steps": partial(_own, objective=REVERSE, reuse=4),
    "its own and the teacher's together, MiniLLM": partial(_own, objective=MINILLM, teacher_share=0.2),
}


def _more(config: Config, run: Path) -> harness.Row:
    """Return the KL and agreement on what the trained student answers itself to the held-out questions."""
    asked = replace(config.answers, student_share=1.0, teacher_share=0.0, reuse=1, sampling=Sampling(temperature=1.0))
    config = replace(config, student=ModelSpec(source=str(run)), answers=asked, objective=FORWARD)
    job = build(config, answered(config, run))
    state, frozen = job.start(), job.frozen()
    batches = job.data.evaluation(config.batch_size)
    own = (reanswered(job, state, frozen, batch, number) for number, batch in enumerate(batches))
    figures = evaluate(lambda given: job.sums(state.params, *given), (job.given(frozen, batch) for batch in own))
    return {"own_kl": figures["kl"], "own_agreement": figures["agreement"]}


STUDY = runs.Study(
    name="answers",
    doc=__doc__ or "",
    base=_base,
    arms=ARMS,
    columns={
        "KL on the teacher's answers": lambda row: f"{row['kl_before']:.3f} → {row['kl_after']:.3f}",
        "on its own": lambda row: f"{row['own_kl']:.3f}",
        "agreement on its own": lambda row: percent(row["own_agreement"]),
        "a step": lambda row: f"{row['step_seconds']:.2f} s",
        "of it drawing answers": lambda row: (
            f"{row['generation_seconds'] / row['steps']:.2f} s" if "generation_seconds" in row else "–"
        ),
    },
    curve=("eval_kl", "held-out KL on the teacher's answers, nats a token"),
    about=lambda row: f"{row['steps']} steps of 4 rows, one run each at one learning rate; KL in nats a token.",
    more=_more,
)

if __name__ == "__main__":
    runs.run(STUDY)
