"""What quick forms run on: a decoder of random weights that reads bytes, and recipes that take seconds with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from kdjax.config import Config
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.models import Model, ModelConfig, ModelSpec, export
from kdjax.models.model_file import lazy
from kdjax.prompts.config import PromptsConfig, SpeakerConfig

SMALL = ModelConfig(
    vocab_size=264, width=48, layers=3, heads=6, kv_heads=3, head_width=8, mlp_width=64, max_positions=8192
)


def model(home: Path) -> str:
    """Return the directory of a small decoder with random weights, written into `home` where it is not there.

    From here on XLA does not optimise: a trial's time is nearly all compiling, and it tells no times.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    if (home / "model").exists():
        return str(home / "model")
    byte_tokenizer().save(home / "tokenizer")
    params = jax.tree.map(lambda x: lazy(np.asarray(x)), Model(SMALL).init(jax.random.key(0)))
    return str(export(SMALL, params, home / "model", home / "tokenizer" / "tokenizer.json"))


def recipe(config: Config, home: Path) -> Config:
    """Return a recipe in two steps: its teacher the small decoder, and its student too where it is not made of that."""
    student = config.student if config.student.source == "teacher" else ModelSpec(architecture=SMALL)
    kept = (0, SMALL.layers - 1) if student.keep_layers else ()
    data, answers, optim = config.data, config.answers, replace(config.optim, warmup_steps=1)
    lengths = {"sequence_length": 4 * data.sequence_length, "teacher_length": 4 * data.teacher_length}  # bytes
    data = replace(data, tokenizer="", eval_tokens=2048, dedupe_ngram=0, **lengths)
    answers = replace(answers, tokens=min(answers.tokens, 4), count=min(answers.count or 40, 40), unrelated=())
    own = {"teacher": ModelSpec(source=model(home)), "student": replace(student, keep_layers=kept)}
    own |= {"data": data, "answers": answers, "optim": optim}
    return replace(config, **own, steps=2, batch_size=2, eval_every=0, prompt="")


def prompts(config: PromptsConfig, home: Path) -> PromptsConfig:
    """Return a search of few prompts on few examples, all models the small decoder."""
    rows = {"propose_rows": 8, "select_rows": 6, "test_rows": 6, "budget": 48, "rounds": 1, "proposal_tokens": 4}
    speaker = SpeakerConfig(model(home))
    return replace(config, **rows, scorer=speaker, proposer=speaker, max_new_tokens=4)
