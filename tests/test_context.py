"""Context distillation: the divergence between a prompted teacher and a student that sees less, and that it falls."""

# ruff: noqa: F811

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from test_build import config, directory, exported, refused, taught_by  # noqa: F401

from kdjax.build import build
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.models import Model, ModelSpec, open_model
from kdjax.models.config import Lora
from kdjax.shapes import View
from kdjax.summary import quantizing
from kdjax.train import train

home = tiny_run.home
RULES = "Always shout. "
LONGEST = 48


def rows_of(count):
    rng = np.random.default_rng(0)
    return [
        {"prompt": f"{n}", "answer": "".join(rng.choice(list("abcdef"), int(rng.integers(2, 9))))} for n in range(count)
    ]


@pytest.fixture
def made(config, directory, tmp_path):
    """A student that is the teacher itself, adapters aside, and sees the prompt without the rules."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of(120)))
    (tmp_path / "teacher.jinja").write_text(f"{RULES}{{{{ prompt }}}}: ")
    made = taught_by(config, directory, source="teacher", lora=Lora(rank=4))
    views = {
        "student_view": "{{ prompt }}: ",
        "teacher_view": f"@{tmp_path / 'teacher.jinja'}",
        "teacher_length": LONGEST,
    }
    own = replace(made.data, sources=(f"jsonl:{tmp_path / 'rows.jsonl'}",), packing="first_fit", **views)
    return replace(made, data=replace(own, eval_fraction=0.2, eval_tokens=256), prompt="", steps=20, eval_every=0)


def log_probs(model, params, ids):
    """Of one text alone, in a row of its own."""
    row = np.arange(LONGEST, dtype=np.int32)[None]
    view = View(np.array([ids + [0] * (LONGEST - len(ids))], np.int32), (row < len(ids)).astype(np.int32), row)
    hidden_TD = jax.jit(model.apply)(params, view).hidden_BTD[0, : len(ids)]
    logits = np.asarray(hidden_TD, np.float64) @ np.asarray(model.head(params).w_DV, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_divergence_is_that_of_each_answer_alone_behind_each_prompt(made):
    job, tokenizer = build(made), byte_tokenizer()
    file = open_model(made.teacher.source)
    model, params = Model(file.config), jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), file.tensors)
    total = tokens = 0
    for batch in job.data.evaluation(made.batch_size):
        for b in range(made.batch_size):
            for segment in range(1, batch.student.segment_BT[b].max() + 1):
                short, long = (
                    view.tokens_BT[b][view.segment_BT[b] == segment].tolist() for view in (batch.student, batch.teacher)
                )
                assert tokenizer.decode(long) == RULES + tokenizer.decode(short)
                count = len(short) - 1 - tokenizer.decode(short).index(": ") - 1
                q, p = (log_probs(model, params, ids)[-count - 1 : -1] for ids in (short, long))
                total += (np.exp(p) * (p - q)).sum()
                tokens += count
    state, frozen = job.start(), job.frozen()
    sums = [job.sums(state.params, frozen, job.place.put_batch(b)) for b in job.data.evaluation(made.batch_size)]
    assert sum(float(s["kd_tokens"]) for s in sums) == tokens > 50
    assert sum(float(s["kd"]) for s in sums) == pytest.approx(total, rel=1e-4) and total > 0


@pytest.mark.slow
def test_a_student_takes_up_what_the_prompt_does(made, home):
    made = replace(made, objective=replace(made.objective, alpha=0.0), optim=replace(made.optim, learning_rate=1e-2))
    summary = train(made, home / "context")
    assert 0 < summary["kl_after"] < 0.7 * summary["kl_before"]


@pytest.mark.slow
def test_what_quantising_costs_is_measured_behind_the_teachers_prompt(made):
    made = replace(made, teacher=replace(made.teacher, quantize="int4"), student=replace(made.student, lora=Lora()))
    job = build(made)
    frozen = job.frozen()
    model, whole = job.teacher.model, build(replace(made, teacher=replace(made.teacher, quantize="none"))).frozen()
    total = tokens = 0
    for batch in job.data.evaluation(made.batch_size):
        for b in range(made.batch_size):
            at = np.flatnonzero(batch.kd_weight_BR[b])
            segment_T, tokens_T = batch.teacher.segment_BT[b], batch.teacher.tokens_BT[b]
            for segment in np.unique(segment_T[batch.teacher_rows_BR[b][at]]):
                first = np.flatnonzero(segment_T == segment)[0]
                rows = batch.teacher_rows_BR[b][at]
                rows = rows[segment_T[rows] == segment] - first
                ids = tokens_T[segment_T == segment].tolist()
                p, q = (log_probs(model, tree["teacher"], ids)[rows] for tree in (whole, frozen))
                total += (np.exp(p) * (p - q)).sum()
                tokens += len(rows)
    found = quantizing(job, frozen)
    assert found["kl_quantized"] == pytest.approx(total / tokens, rel=1e-3) and total > 0


def test_views_that_do_not_fit_the_models_are_refused(made):
    refused(replace(made, teacher=None, student=ModelSpec(source=made.teacher.source)), "data.teacher_view is set, but")
    refused(
        replace(made, data=replace(made.data, teacher_length=4096)), "data.teacher_length is 4096 but the teacher was"
    )
