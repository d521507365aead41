"""A teacher -> a student cut out of it, written as a Hugging Face directory and measured before it is trained."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import data
from kdjax.build import Named, recipe
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.errors import UserError
from kdjax.evaluate import evaluate, sums_of
from kdjax.losses import Feature, ObjectiveConfig
from kdjax.models import Cut, Importance, Model, ModelFile, export, open_model, parameter_count
from kdjax.models.config import DType, ModelConfig
from kdjax.models.files import check_free
from kdjax.models.importance import importance, statistics
from kdjax.models.prune import ENCODER, densified, pick, shape, take
from kdjax.shapes import Batch
from kdjax.sharding import MeshConfig, Placement, placement

log = logging.getLogger(__name__)

LEAST_ROWS = 4
"""Rows of a batch, or one for each device where these are more."""
COUNTED = 64
"""A vocabulary is counted over so many times the rows that importance is measured on."""

Report = dict[str, Any]


def make_student(source: str, out: Path, cut: Cut, text: DataConfig, rows: int, dtype: DType = "float32") -> Report:
    """Return what student.json says of the student written to `out`: sizes, what was kept, scores and figures.

    Where the vocabulary is cut, the teacher that all else is measured on and against has that vocabulary too: its
    probabilities are those of the kept tokens, renormalised.

    Args:
        source: the teacher: whatever `open_model` takes.
        out: must not exist, or be empty.
        cut: what to keep.
        text: where examples come from, and the tokens of a row.
        rows: to measure importance on; as many held-out ones measure the divergence.
        dtype: of the measuring, and of the weights in `out`.

    Raises:
        UserError: the student cannot be, there is no tokenizer or no text, or `out` is not empty.
    """
    check_free(out)
    teacher = open_model(source)
    teacher.check_plain()
    _tokenizer(teacher)
    if rows < 1:
        raise UserError(f"rows is {rows}; wanted at least 1")
    shape(teacher, cut)
    text = suited(text, teacher.config, rows)
    place = placement(MeshConfig())
    batch_size = place.batch_devices * -(-LEAST_ROWS // place.batch_devices)
    with tempfile.TemporaryDirectory() as scratch:
        if cut.vocab is not None:
            teacher = cut_vocabulary(teacher, cut.vocab, text, rows * COUNTED, Path(scratch))
        loader = _loader(teacher, text, batch_size)
        batches = [batch for batch, _ in itertools.islice(loader.train(), -(-rows // batch_size))]
        dense, scores = measured(teacher, cut, place, batches, dtype)
        picks = pick(dense.config, cut, scores)
        student = take(dense, picks)
        figures = compared(place, teacher, student, loader.evaluation(batch_size), dtype, picks.get("D"))
        export(student.config, student.tensors, out, student.tokenizer, dtype)
    report = {
        "teacher": source,
        "cut": vars(cut),
        "kept": {NAMES[letter]: index.tolist() for letter, index in picks.items()},
        "importance": {name: None if score is None else _rounded(score) for name, score in vars(scores).items()},
        "models": figures,
        "held_out_sha256": loader.held_out_hash,
    }
    (out / "student.json").write_text(json.dumps(report) + "\n", "utf-8")
    return report


NAMES = {"L": "layers", "M": "encoder_layers", "D": "channels", "F": "neurons", "G": "kv_heads", "H": "heads"}
NAMES |= {f"{ENCODER}{letter}": f"encoder_{NAMES[letter]}" for letter in "FGH"}
"""What student.json calls the units of a dimension."""

FIGURES = ("kl", "agreement", "perplexity", "features", "tokens")
"""What of an evaluation student.json has, where the task knows it."""

WHOLE = ("classification", "seq2seq")
"""Tasks whose examples are never cut into rows."""

UNMASKED = {"masked_lm": "embedding"}
"""Task of a model -> the one that shows it the same text with nothing hidden."""


def _rounded(score: np.ndarray) -> Any:
    return np.vectorize(lambda x: float(f"{x:.4g}"))(score).tolist()


def _tokenizer(file: ModelFile) -> Path:
    if file.tokenizer is None:
        raise UserError(f"{file.source} has no tokenizer.json; wanted one beside the weights")
    return file.tokenizer


def suited(text: DataConfig, config: ModelConfig, rows: int) -> DataConfig:
    """Return the text as a model is trained on it, in its task's rows, and so many of them held out.

    Raises:
        UserError: its rows are longer than the model's positions.
    """
    if text.sequence_length > config.max_positions:
        raise UserError(
            f"rows have {text.sequence_length} tokens; the teacher was made for {config.max_positions} positions at "
            "most: lower --sequence-length"
        )
    packing = "first_fit" if config.task in WHOLE else text.packing
    return replace(text, task=config.task, packing=packing, eval_tokens=rows * text.sequence_length)


def _loader(file: ModelFile, text: DataConfig, batch_size: int) -> data.Data:
    tokenizer = data.load_tokenizer(_tokenizer(file))
    data.check_fits(tokenizer, file.config.vocab_size)
    c = file.config
    return data.build(text, tokenizer, batch_size=batch_size, start_token=c.start_token, labels=c.labels)


def cut_vocabulary(file: ModelFile, size: int, text: DataConfig, rows: int, directory: Path) -> ModelFile:
    """Return the model with the tokens that occur most in some rows of text, its tokenizer written to `directory`."""
    counts: Counter[int] = Counter()
    data.trim_tokenizer(_tokenizer(file), counts, size, directory)  # what cannot be is refused before the counting
    log.info("counting tokens")
    loader = _loader(file, replace(text, task=UNMASKED.get(text.task, text.task)), LEAST_ROWS)
    for batch, _ in itertools.islice(loader.train(), -(-rows // LEAST_ROWS)):
        ids, found = np.unique(batch.student.tokens_BT[batch.student.segment_BT > 0], return_counts=True)
        counts.update(dict(zip(ids.tolist(), found.tolist(), strict=True)))
    old_ids = data.trim_tokenizer(_tokenizer(file), counts, size, directory)
    return replace(take(file, {"V": np.array(old_ids)}), tokenizer=directory / "tokenizer.json")


def measured(
    teacher: ModelFile, cut: Cut, place: Placement, batches: Sequence[Batch], dtype: DType
) -> tuple[ModelFile, Importance]:
    """Return the model to cut units from, without experts if asked for, and the importance of its units."""
    log.info("measuring importance on %d tokens", sum(batch.student.tokens_BT.size for batch in batches))
    scores = scored(teacher, place, batches, dtype)
    if not cut.dense or scores.expert_LE is None:
        return teacher, scores
    dense = densified(teacher, scores.expert_LE.argmax(axis=1).tolist())
    return dense, replace(scored(dense, place, batches, dtype), expert_LE=scores.expert_LE)


def scored(file: ModelFile, place: Placement, batches: Sequence[Batch], dtype: DType) -> Importance:
    """Return the importance of a model's units on some batches."""
    named = _named(file.config, file, place, dtype)
    params = named.params(place, jax.random.key(0), dtype)
    sums = place.compile_sums(lambda params, _, batch: statistics(named.model, params, batch.student))
    return importance([jax.device_get(sums(params, {}, place.put_batch(batch))) for batch in batches])


def compared(
    place: Placement,
    teacher: ModelFile,
    student: ModelFile,
    batches: Sequence[Batch],
    dtype: DType,
    channels_D: np.ndarray | None = None,
) -> dict[str, Report]:
    """Return sizes of teacher, student and a random student of its shape, and what each is worth on held-out rows."""
    log.info("measuring teacher, student and a random student on held-out text")
    taught = _named(teacher.config, teacher, place, dtype)
    frozen = {"teacher": taught.params(place, jax.random.key(0), dtype)}
    found = {"teacher": _sizes(taught, dtype)}
    for name, file in (("student", student), ("random student", None)):
        named = _named(student.config, file, place, dtype)
        params = named.params(place, jax.random.key(0), dtype)
        figures = divergence(place, named, params, taught, frozen, batches, channels_D)
        found[name] = _sizes(named, dtype) | {key: figures[key] for key in FIGURES if key in figures}
        of_teacher = {"perplexity": "teacher_perplexity", "tokens": "tokens"}
        found["teacher"] |= {key: figures[theirs] for key, theirs in of_teacher.items() if theirs in figures}
    return found


def divergence(
    place: Placement,
    student: Named,
    params: Any,
    teacher: Named,
    frozen: Any,
    batches: Sequence[Batch],
    channels_D: np.ndarray | None = None,
) -> Mapping[str, float]:
    """Return the figures of `evaluate` on some batches; what is random about the config's recipe plays no part.

    Encoders without a head are compared by what their last layers give, 1 − cosine, a student of fewer channels having
    those at their places `channels_D` among the teacher's and 0 elsewhere.
    """
    made = recipe(replace(Config(), objective=_objective(student, teacher)), place, student, teacher)
    width = teacher.model.config.width
    kernels = {name: {"kernel": np.eye(width, dtype=np.float32)[channels_D]} for name in made.projections}
    sums = place.compile_sums(partial(sums_of, recipe=made))
    trained = {"student": params, "projections": kernels}
    return evaluate(lambda batch: sums(trained, frozen, batch), map(place.put_batch, batches))


def _objective(student: Named, teacher: Named) -> ObjectiveConfig:
    if student.model.config.task != "embedding":
        return Config().objective
    last = (student.model.config.layers - 1, teacher.model.config.layers - 1)
    return ObjectiveConfig(logits=False, features=(Feature("hidden_cosine", layers=(last,)),))


def _named(config: ModelConfig, file: ModelFile | None, place: Placement, dtype: DType) -> Named:
    return Named(Model(config, dtype, layout=place.constrain, dispatch=place.dispatch), file, "")


def _sizes(named: Named, dtype: DType) -> Report:
    config = named.model.config
    parameters = parameter_count(jax.eval_shape(named.model.init, jax.random.key(0)))
    fields = ("layers", "width", "heads", "kv_heads", "mlp_width", "experts", "vocab_size")
    fields += ("encoder_layers",) * (config.task == "seq2seq")
    return {name: getattr(config, name) for name in fields} | {
        "parameters": parameters,
        "bytes": parameters * np.dtype(jax.numpy.dtype(dtype)).itemsize,
    }
