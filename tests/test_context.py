"""Context distillation: the divergence between a prompted teacher and a student that sees less, and that it falls."""

# ruff: noqa: F811

import itertools
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from test_build import config, directory, exported, refused, taught_by  # noqa: F401

from kdjax.build import build
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.models import Model, ModelConfig, ModelSpec, open_model
from kdjax.models.config import Lora, Rope
from kdjax.shapes import View
from kdjax.sharding import MeshConfig
from kdjax.summary import quantizing
from kdjax.train import train

home = tiny_run.home
RULES = "Always shout. "
LONG_RULES = "Always shout, whatever you are asked, and never whisper. "
LONGEST = 96


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


def ruled(made, rules):
    """The same with other rules before the teacher's prompt."""
    path = Path(made.data.teacher_view[1:])
    path.write_text(f"{rules}{{{{ prompt }}}}: ")
    return made


@partial(jax.jit, static_argnums=0)
def hidden(model, params, view):
    return model.apply(params, view).hidden_BTD


def log_probs(model, params, ids):
    """Of one text alone, in a row of its own."""
    row = np.arange(LONGEST, dtype=np.int32)[None]
    view = View(np.array([ids + [0] * (LONGEST - len(ids))], np.int32), (row < len(ids)).astype(np.int32), row)
    hidden_TD = hidden(model, params, view)[0, : len(ids)]
    logits = np.asarray(hidden_TD, np.float64) @ np.asarray(model.head(params).w_DV, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


RULED = pytest.mark.parametrize(
    "rules", [pytest.param(RULES, marks=pytest.mark.slow), LONG_RULES], ids=["in each row", "shared"]
)


@RULED
def test_the_divergence_is_that_of_each_answer_alone_behind_each_prompt(made, rules):
    job, tokenizer = build(ruled(made, rules)), byte_tokenizer()
    shared = list(job.data.shared)
    assert tokenizer.decode(shared) == (LONG_RULES if rules is LONG_RULES else "")
    file = open_model(made.teacher.source)
    model, params = Model(file.config), jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), file.tensors)
    total = tokens = 0
    for batch in job.data.evaluation(made.batch_size):
        for b in range(made.batch_size):
            for segment in range(1, batch.student.segment_BT[b].max() + 1):
                short, long = (
                    view.tokens_BT[b][view.segment_BT[b] == segment].tolist() for view in (batch.student, batch.teacher)
                )
                long = shared + long
                assert tokenizer.decode(long) == rules + tokenizer.decode(short)
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
@RULED
def test_what_quantising_costs_is_measured_behind_the_teachers_prompt(made, rules):
    made = ruled(made, rules)
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
                ids = [*job.data.shared, *tokens_T[segment_T == segment].tolist()]
                rows = rows + len(job.data.shared)
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


WIDE = ModelConfig(vocab_size=264, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=32)
MESHES = {
    "jit": MeshConfig(),
    "pmap": MeshConfig(placement="pmap"),
    "fsdp and tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}


def two_steps(made, mesh=MESHES["jit"], **changes):
    """What is logged of two steps, each with the sums of an evaluation after it."""
    job = build(replace(made, mesh=mesh, data=replace(made.data, teacher_length=400, **changes)))
    state, frozen, said = job.start(), job.frozen(), []
    held_out = job.place.put_batch(job.data.evaluation(made.batch_size)[0])
    for batch, _ in itertools.islice(job.data.train(None, prefetch=0), 2):
        state, metrics = job.step(state, frozen, job.place.put_batch(batch))
        said.append({name: float(value) for name, value in metrics.items()})
        said.append({name: float(x) for name, x in job.sums(state.params, frozen, held_out).items()})
    return job, frozen, said


@pytest.fixture
def shared(made):
    """A teacher of several key/value heads behind rules that are shared, and a student that is trained whole."""
    teacher = ModelSpec(architecture=WIDE)
    own = replace(ruled(made, LONG_RULES).data, tokenizer="bytes", eval_tokens=512)
    return replace(made, teacher=teacher, student=replace(teacher, lora=Lora()), data=own)


def same(one, other):
    assert len(one) == len(other) == 4 and one[0]["kd"] > 0 and one[0]["loss"] != one[2]["loss"]
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)


@pytest.mark.slow
def test_steps_are_the_same_with_the_prompt_shared_and_in_each_row(shared):
    (on, frozen, said), (off, without, wanted) = two_steps(shared), two_steps(shared, share_prefix=False)
    assert frozen["teacher_prefix"].tokens == len(LONG_RULES) == len(on.data.shared)
    assert not off.data.shared and without.keys() == {"teacher"}
    same(said, wanted)


def test_the_teacher_says_the_same_with_the_prompt_shared_and_in_each_row(shared):
    said = []
    for share in (True, False):
        job = build(replace(shared, data=replace(shared.data, teacher_length=400, share_prefix=share)))
        batch, frozen = next(job.data.train(None, prefetch=0))[0], job.frozen_teacher()
        signal = jax.jit(job.recipe.signal_of)(frozen, batch)
        said.append(np.asarray(signal.hidden_ND)[batch.kd_weight_BR.reshape(-1) > 0])
        assert batch.teacher.segment_BT.max() > 2 and bool(job.data.shared) == share == ("teacher_prefix" in frozen)
    assert len(said[0]) > 50
    np.testing.assert_allclose(*said, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["pmap", "fsdp and tensor"])
def test_they_are_so_wherever_arrays_lie(shared, mesh):
    (job, frozen, said), (_, _, wanted) = two_steps(shared, MESHES[mesh]), two_steps(shared, share_prefix=False)
    keys = frozen["teacher_prefix"].k_LBPGK
    split = 2 if mesh == "fsdp and tensor" else 1
    assert keys.sharding.shard_shape(keys.shape) == (2, 1, len(LONG_RULES), 2 // split, 8)
    assert job.config.microbatches == 2
    same(said, wanted)


def test_a_shared_prompt_counts_among_the_teachers_positions(made):
    made = ruled(made, LONG_RULES)
    limit = 2048 - len(LONG_RULES)
    assert build(replace(made, data=replace(made.data, teacher_length=limit))).data.shared
    said = f"data.teacher_length is {limit + 1}, behind {len(LONG_RULES)} tokens .* but the teacher was made for 2048"
    refused(replace(made, data=replace(made.data, teacher_length=limit + 1)), said)


def test_a_teacher_that_takes_no_prefix_has_its_prompt_in_each_row(shared, caplog):
    rope = Rope(scaling="dynamic", factor=2.0, made_for=64)
    caplog.set_level("INFO")
    job = build(replace(shared, teacher=ModelSpec(architecture=replace(WIDE, rope=rope))))
    assert job.data.shared == () and "the teacher reads its whole view in each row: its rotary angles" in caplog.text


@pytest.mark.slow
def test_a_run_goes_on_behind_the_shared_prompt(shared, home):
    made = replace(shared, steps=4, checkpoint=replace(shared.checkpoint, every=2))
    train(made, home / "whole")
    shutil.copytree(home / "whole", home / "resumed")
    shutil.rmtree(home / "resumed" / "checkpoints" / "4")
    train(made, home / "resumed")
    assert tiny_run.rows(home / "whole") == tiny_run.rows(home / "resumed")
