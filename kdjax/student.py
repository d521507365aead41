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
from kdjax.models import Cut, Importance, Model, ModelFile, export, open_model, parameter_count, select_layers
from kdjax.models.config import DType, ModelConfig
from kdjax.models.files import check_free
from kdjax.models.importance import importance, statistics
from kdjax.models.prune import densified, pick, shape, take
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
    _tokenizer(teacher)
    if rows < 1:
        raise UserError(f"rows is {rows}; wanted at least 1")
    shape(teacher, cut)
    place = placement(MeshConfig())
    batch_size = place.batch_devices * -(-LEAST_ROWS // place.batch_devices)
    text = replace(text, eval_tokens=rows * text.sequence_length)
    with tempfile.TemporaryDirectory() as scratch:
        if cut.vocab is not None:
            log.info("counting tokens")
            teacher = cut_vocabulary(teacher, cut.vocab, text, rows * COUNTED, Path(scratch))
        loader = _loader(teacher, text, batch_size)
        batches = [batch for batch, _ in itertools.islice(loader.train(), -(-rows // batch_size))]
        dense, scores = measured(teacher, cut, place, batches, dtype)
        keep, picks = pick(dense.config, cut, scores)
        student = take(select_layers(dense, keep), picks)
        figures = compared(place, teacher, student, loader.evaluation(batch_size), dtype)
        export(student.config, student.tensors, out, student.tokenizer, dtype)
    kept = {"layers": keep, **{NAMES[letter]: index.tolist() for letter, index in picks.items()}}
    report = {
        "teacher": source,
        "cut": vars(cut),
        "kept": kept,
        "importance": {name: None if score is None else _rounded(score) for name, score in vars(scores).items()},
        "models": figures,
        "held_out_sha256": loader.held_out_hash,
    }
    (out / "student.json").write_text(json.dumps(report) + "\n", "utf-8")
    return report


NAMES = {"D": "channels", "F": "neurons", "G": "kv_heads", "H": "heads"}
"""What student.json calls the units of a dimension."""


def _rounded(score: np.ndarray) -> Any:
    return np.vectorize(lambda x: float(f"{x:.4g}"))(score).tolist()


def _tokenizer(file: ModelFile) -> Path:
    if file.tokenizer is None:
        raise UserError(f"{file.source} has no tokenizer.json; wanted one beside the weights")
    return file.tokenizer


def _loader(file: ModelFile, text: DataConfig, batch_size: int) -> data.Data:
    tokenizer = data.load_tokenizer(_tokenizer(file))
    data.check_fits(tokenizer, file.config.vocab_size)
    return data.build(text, tokenizer, batch_size=batch_size)


def cut_vocabulary(file: ModelFile, size: int, text: DataConfig, rows: int, directory: Path) -> ModelFile:
    """Return the model with the tokens that occur most in some rows of text, its tokenizer written to `directory`."""
    counts: Counter[int] = Counter()
    for batch, _ in itertools.islice(_loader(file, text, LEAST_ROWS).train(), -(-rows // LEAST_ROWS)):
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
    place: Placement, teacher: ModelFile, student: ModelFile, batches: Sequence[Batch], dtype: DType
) -> dict[str, Report]:
    """Return sizes of teacher, student and a random student of its shape, and what each is worth on held-out rows."""
    log.info("measuring teacher, student and a random student on held-out text")
    taught = _named(teacher.config, teacher, place, dtype)
    frozen = {"teacher": taught.params(place, jax.random.key(0), dtype)}
    found = {"teacher": _sizes(taught, dtype)}
    for name, file in (("student", student), ("random student", None)):
        named = _named(student.config, file, place, dtype)
        figures = divergence(place, named, named.params(place, jax.random.key(0), dtype), taught, frozen, batches)
        found[name] = _sizes(named, dtype) | {key: figures[key] for key in ("kl", "agreement", "perplexity", "tokens")}
        found["teacher"] |= {"perplexity": figures["teacher_perplexity"], "tokens": figures["tokens"]}
    return found


def divergence(
    place: Placement, student: Named, params: Any, teacher: Named, frozen: Any, batches: Sequence[Batch]
) -> Mapping[str, float]:
    """Return the figures of `evaluate` on some batches; what is random about the config's recipe plays no part."""
    sums = place.compile_sums(partial(sums_of, recipe=recipe(Config(), place, student, teacher)))
    return evaluate(lambda batch: sums({"student": params}, frozen, batch), map(place.put_batch, batches))


def _named(config: ModelConfig, file: ModelFile | None, place: Placement, dtype: DType) -> Named:
    return Named(Model(config, dtype, layout=place.constrain, dispatch=place.dispatch), file, "")


def _sizes(named: Named, dtype: DType) -> Report:
    config = named.model.config
    parameters = parameter_count(jax.eval_shape(named.model.init, jax.random.key(0)))
    fields = ("layers", "width", "heads", "kv_heads", "mlp_width", "experts", "vocab_size")
    return {name: getattr(config, name) for name in fields} | {
        "parameters": parameters,
        "bytes": parameters * np.dtype(jax.numpy.dtype(dtype)).itemsize,
    }
