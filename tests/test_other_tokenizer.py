"""A teacher with another tokenizer: what a batch is worth, against each example alone, and that a student learns."""

# ruff: noqa: F811

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from test_build import SMALL, config, refused  # noqa: F401
from test_context import rows_of

from kdjax.answers import answered
from kdjax.build import build
from kdjax.data.across import token_bytes
from kdjax.errors import UserError
from kdjax.label import label
from kdjax.losses import ObjectiveConfig, chunk_divergence
from kdjax.losses.across import projected, sorted_distance
from kdjax.metrics import METRICS, read
from kdjax.models import Model, ModelSpec, export
from kdjax.sampling import AnswersConfig
from kdjax.shapes import View
from kdjax.sharding import MeshConfig, TeacherMeshConfig
from kdjax.step import gradient
from kdjax.teachers import CoTeacher
from kdjax.train import train

home = tiny_run.home
LONGEST = 64


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher whose vocabulary has some of the words that rows have, and that is far from uniform."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    place = tmp_path_factory.mktemp("other")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator([f"{row['prompt']}: {row['answer']}" for row in rows_of(60)] * 3, trainer)
    (place / "tokenizer").mkdir()
    backend.save(str(place / "tokenizer" / "tokenizer.json"))
    small = replace(SMALL, vocab_size=330)
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 2 or len(x) == 330 else x, Model(small).init(jax.random.key(1)))
    return export(small, params, place / "model", place / "tokenizer" / "tokenizer.json")


@pytest.fixture
def made(config, teacher, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of(120)))
    data = replace(
        config.data, sources=(f"jsonl:{tmp_path / 'rows.jsonl'}",), packing="first_fit", student_view="{{ prompt }}: ",
        teacher_tokenizer="own", teacher_length=24, eval_fraction=0.2, eval_tokens=256,
    )  # fmt: skip
    objective = ObjectiveConfig(alpha=0.0, divergence="alm")
    return replace(
        config, teacher=ModelSpec(source=str(teacher)), data=data, objective=objective, steps=20, eval_every=0,
        prompt="a",
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def whole(model, params, tokens_BT, length):
    row = jnp.arange(LONGEST)[None]
    hidden_TD = model.apply(params, View(tokens_BT, (row < length).astype(jnp.int32), row)).hidden_BTD[0]
    return jax.nn.log_softmax(hidden_TD @ model.head(params).w_DV)


def log_probs(model, params, ids):
    """Of one text alone, in a row of its own."""
    return whole(model, params, np.array([ids + [0] * (LONGEST - len(ids))], np.int32), len(ids))


def examples(view, tokenizer):
    """The texts of a batch's rows, one after the other."""
    for tokens_T, segment_T in zip(view.tokens_BT, view.segment_BT, strict=True):
        for number in range(1, int(segment_T.max()) + 1):
            yield tokens_T[segment_T == number].tolist()


OBJECTIVES = {
    "alm": ObjectiveConfig(alpha=0.0, divergence="alm(tau=10)"),
    "uld": ObjectiveConfig(alpha=0.0, divergence="uld"),
    "projected": ObjectiveConfig(alpha=0.0, divergence="forward_kl"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_worth_what_its_examples_alone_are(made, name):
    """Packed, in microbatches and on a mesh of devices, in value and gradient: against loops over texts, each alone."""
    mesh = MeshConfig(data=4, fsdp=2)
    job = build(replace(made, objective=replace(OBJECTIVES[name], chunk_tokens=48), mesh=mesh))
    state, frozen, batch = job.start(), job.frozen(), next(job.data.train(prefetch=0))[0]
    ours, theirs = job.tokenizer, job.other_tokenizer
    sides = [(one, list(examples(view, one))) for one, view in ((ours, batch.student), (theirs, batch.teacher))]
    spelled = [[b"".join(token_bytes(one)[n] for n in ids) for ids in texts] for one, texts in sides]
    assert spelled[0] == spelled[1] and len(spelled[0]) > 10
    student_of_U = jnp.asarray(job.recipe.signal_of(frozen, jax.tree.map(jnp.asarray, batch)).student_of_U)

    def loss(student):
        total, count = 0.0, 0
        for own, other, text in zip(sides[0][1], sides[1][1], spelled[0], strict=True):
            log_q, log_p = (
                log_probs(job.student.model, student, own),
                log_probs(job.teacher.model, frozen["teacher"], other),
            )
            begin = text.index(b": ") + 2
            starts = [
                np.cumsum([0, *(len(token_bytes(one)[n]) for n in ids)])[:-1].tolist()
                for one, ids in ((ours, own), (theirs, other))
            ]
            common = sorted(start for start in set(starts[0]) & set(starts[1]) if start >= begin)
            at = [[each.index(start) for start in common] for each in starts]
            for k, (i, j) in enumerate(zip(*at, strict=True)):
                ends = [at[side][k + 1] if k + 1 < len(common) else len(ids) for side, ids in enumerate((own, other))]
                count += 1
                if name == "alm":
                    q = sum(log_q[t - 1, own[t]] for t in range(i, ends[0]))
                    p = sum(log_p[t - 1, other[t]] for t in range(j, ends[1]))
                    total += chunk_divergence(q, p, 10.0)
                elif name == "uld":
                    total += sorted_distance(log_q[i - 1][None], log_p[j - 1][None])[0]
                else:
                    q, p = log_q[i - 1][None], projected(log_p[j - 1][None], student_of_U, log_q.shape[1])
                    total += (jnp.exp(p) * (p - q)).sum()
        return total / count

    got, parts = jax.jit(partial(gradient, job.recipe))(state, *job.given(frozen, batch, trains=True))
    value, wanted = jax.value_and_grad(loss)(state.params["student"])
    assert float(parts["loss"]) == pytest.approx(float(value), rel=1e-3)
    for x, y in zip(jax.tree.leaves(got["student"]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4 * float(np.abs(y).max()) + 1e-7)


@pytest.mark.slow
def test_sorted_probabilities_come_nearer(made, home):
    """By their own measure: which token is which they do not know."""
    optim = replace(made.optim, learning_rate=1e-2)
    train(replace(made, objective=OBJECTIVES["uld"], optim=optim, steps=40), home / "uld")
    kd = [row["kd"] for row in read(home / "uld" / METRICS) if "kd" in row]
    assert np.mean(kd[-5:]) < 0.9 * np.mean(kd[:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alm", "projected"])
def test_a_student_learns_from_it(made, home, name):
    """`kl` is that from the teacher projected onto the student's vocabulary, where both have a border."""
    made = replace(made, objective=OBJECTIVES[name], optim=replace(made.optim, learning_rate=1e-2), steps=40)
    summary = train(made, home / name)
    assert 0 < summary["kl_after"] < 0.8 * summary["kl_before"]
    assert {"teacher", "student before"} <= set(summary["continuations"])
    assert "ce_teacher" not in summary and 0 <= summary["agreement_after"] <= 1


def test_plain_text_is_cut_where_both_have_room(made, home):
    data = replace(made.data, sources=("python_docs",), student_view="", dedupe_ngram=0, teacher_length=0)
    summary = train(replace(made, data=data, steps=3, prompt=""), home / "texts")
    assert np.isfinite(summary["kl_after"])


@pytest.mark.slow
def test_the_teachers_answers_are_in_its_own_tokens(made, home):
    """Sampled behind its view, decoded by its tokenizer, and learned in the student's bytes."""
    data = replace(made.data, teacher_length=48, sequence_length=48)
    config = replace(made, data=data, answers=AnswersConfig(by="teacher", tokens=8, count=30), steps=3)
    (home / "said").mkdir()
    text = answered(config, home / "said")
    path = home / "said" / "answers.jsonl"
    assert text is not None and 20 < len(path.read_text().splitlines()) <= 30
    assert train(config, home / "said")["steps"] == 3


REFUSED = {
    "a teacher with another one wants data.teacher_tokenizer": lambda c, t: replace(
        c, data=replace(c.data, teacher_tokenizer="", tokenizer=str(t / "tokenizer.json"))
    ),
    "uld and alm are of a teacher with another tokenizer": lambda c, t: replace(
        c, teacher=None, data=replace(c.data, teacher_tokenizer="")
    ),
    "data.teacher_tokenizer is the student's tokenizer too": None,
    "co_teachers are mixed token by token": lambda c, t: replace(c, co_teachers=(CoTeacher(c.student),)),
    "teacher_mesh.devices is for a teacher with the student's tokens": lambda c, t: replace(
        c, batch_size=14, teacher_mesh=TeacherMeshConfig(devices=1)
    ),
    "mesh.tensor spreads one vocabulary": lambda c, t: replace(c, mesh=MeshConfig(data=4, tensor=2)),
    "answers.student_share puts the student's tokens": lambda c, t: replace(
        c, answers=AnswersConfig(student_share=0.5)
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_wants_one_tokenizer_is_refused(made, teacher, said):
    change = REFUSED[said]
    if change is None:
        path = str(teacher / "tokenizer.json")
        student = replace(made.student, architecture=replace(SMALL, vocab_size=330))
        wrong = replace(made, student=student, data=replace(made.data, tokenizer=path))
    else:
        wrong = change(made, teacher)
    refused(wrong, said)


def test_a_cache_is_of_one_tokenizer(made, home):
    with pytest.raises(UserError, match="a cache is of the student's tokens"):
        label(made, home / "cache")
    with pytest.raises(UserError, match="views are of prompts with answers, for causal_lm in rows of first_fit"):
        replace(made.data, packing="concat")
