"""Training a soft prompt: the model behind it is left as it is, any placement agrees, and the run goes on and away."""

# ruff: noqa: F811

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_run
from test_build import SMALL, base, config, exported, refused, taught_by  # noqa: F401
from test_context import RULES, rows_of
from test_frozen import next_batch

from kdjax.build import build
from kdjax.checkpoint import open_params
from kdjax.errors import UserError
from kdjax.jobs import evaluate_run, export_run, generate_texts
from kdjax.models import Model, ModelSpec, open_model, parameter_count
from kdjax.models.config import SOFT_PROMPT, Lora, SoftPrompt
from kdjax.models.paths import parameter_paths
from kdjax.sharding import MeshConfig
from kdjax.step import gradient, student_params
from kdjax.train import train

home = tiny_run.home
KINDS = ("prompt", "prefix")
WHOLE = {kind: SoftPrompt(-1, kind, "prompt", RULES) for kind in KINDS}


@pytest.fixture(scope="module")
def made(config, base, tmp_path_factory):
    """A student that is the teacher itself behind a soft prompt, which sees what follows the rules."""
    home = tmp_path_factory.mktemp("rows")
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of(60)))
    made = taught_by(config, base, source="teacher", soft_prompt=SoftPrompt(4))
    views = {"student_view": "{{ prompt }}: ", "teacher_view": f"{RULES}{{{{ prompt }}}}: ", "teacher_length": 48}
    own = replace(made.data, sources=(f"jsonl:{home / 'rows.jsonl'}",), packing="first_fit", **views)
    own = replace(own, eval_fraction=0.2, eval_tokens=256)
    return replace(made, data=own, prompt="3", objective=replace(made.objective, alpha=0.0))


def of(made, **values):
    return replace(made, student=replace(made.student, soft_prompt=SoftPrompt(**values)))


def divergence(job, state):
    sums = [
        job.sums(state.params, job.frozen(), job.place.put_batch(b)) for b in job.data.evaluation(job.config.batch_size)
    ]
    return sum(float(s["kd"]) for s in sums) / sum(float(s["kd_tokens"]) for s in sums)


def test_nothing_but_the_soft_prompt_has_a_state(made):
    job = build(of(made, tokens=4, kind="prefix"))
    state = job.abstract_state
    assert set(parameter_paths(state.params["student"])) == {"soft_prompt/k", "soft_prompt/v"}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * parameter_count(state.params["student"])
    frozen = job.frozen()
    of_teacher, of_student = map(parameter_paths, (frozen["teacher"], frozen["student"]))
    assert all(of_teacher[path] is leaf for path, leaf in of_student.items()) and len(of_student) == len(of_teacher)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.slow
def test_behind_the_whole_prompt_the_student_is_the_teacher(made, kind):
    job = build(replace(made, student=replace(made.student, soft_prompt=WHOLE[kind])))
    state = job.start()
    leaf = state.params["student"][SOFT_PROMPT]["embedding" if kind == "prompt" else "k"]
    assert leaf.shape[leaf.ndim // 4] == len(RULES)
    assert 0 <= divergence(job, state) < 1e-7
    bare = {"student": jax.tree.map(np.zeros_like, state.params["student"]), "projections": {}}
    assert divergence(job, replace(state, params=bare)) > 1e-3


def first_gradient(made):
    job = build(made)
    state = job.start()
    of = job.place.compile_sums(lambda state, frozen, batch: gradient(job.recipe, state, frozen, batch))
    gradients, metrics = of(state, job.frozen(), next_batch(job))
    return jax.device_get(gradients["student"][SOFT_PROMPT]), float(metrics["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", [{"placement": "pmap"}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_trap_4_it_has_one_gradient_on_any_mesh(made, kind, mesh):
    made = of(made, tokens=3, kind=kind)
    want, loss = first_gradient(replace(made, mesh=MeshConfig(data=8), microbatches=1))
    got, elsewhere = first_gradient(replace(made, mesh=MeshConfig(**mesh)))
    assert elsewhere == pytest.approx(loss, rel=1e-5)
    for name, leaf in want.items():
        assert np.linalg.norm(leaf) > 0
        np.testing.assert_allclose(got[name], leaf, atol=1e-5 * np.linalg.norm(leaf), err_msg=name)


@pytest.fixture(scope="module")
def trained(made, home):
    """A run of a soft prompt, and what it was made with."""
    made = of(made, tokens=4, kind="prompt", start="prompt", text=RULES)
    made = replace(made, optim=replace(made.optim, learning_rate=0.1))
    return made, home / "soft", train(made, home / "soft")


@pytest.mark.slow
def test_a_run_trains_it_and_nothing_else(trained, base):
    made, run, summary = trained
    assert summary["kl_after"] < summary["kl_before"]
    assert summary["parameters_trained"] == 4 * 16
    params = open_params(run).params
    assert set(params) == {SOFT_PROMPT}
    assert not np.allclose(
        params[SOFT_PROMPT]["embedding"], build(made).start().params["student"][SOFT_PROMPT]["embedding"]
    )
    found, before = open_model(str(run)), open_model(str(base))
    for path, tensor in parameter_paths(before.tensors).items():
        np.testing.assert_array_equal(parameter_paths(found.tensors)[path].all(), tensor.all())


@pytest.mark.slow
def test_what_is_exported_is_the_run(trained, tmp_path):
    made, run, summary = trained
    job, prompts = build(made), ["3: ", "ab"]
    params, frozen, batch = {"student": open_params(run).params}, job.frozen(), next_batch(job)
    own = job.student.model.apply(student_params(job.recipe, params, frozen), batch.student).hidden_BTD
    out = export_run(str(run), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    file = open_model(str(out))
    assert file.tokenizer is not None
    got = Model(file.config).apply(jax.tree.map(lambda x: x.all(), file.tensors), batch.student).hidden_BTD
    np.testing.assert_allclose(got, own, atol=2e-5)
    said = [list(generate_texts(str(where), prompts, max_new_tokens=8)) for where in (run, out)]
    assert said[0] == said[1]
    assert evaluate_run(run)["kl"] == pytest.approx(summary["kl_after"], rel=1e-3)


@pytest.mark.slow
def test_going_on_is_exact(trained, tmp_path):
    made, run, _ = trained
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "4")
    train(made, copy)
    losses = [[row["loss"] for row in tiny_run.rows(where) if "loss" in row] for where in (run, copy)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    first, second = (open_params(where, step=4).params[SOFT_PROMPT]["embedding"] for where in (run, copy))
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_a_base_that_has_changed_is_refused_behind_an_export_too(trained, tmp_path):
    out = export_run(str(trained[1]), tmp_path / "out")
    record = json.loads((out / "base.json").read_text())
    (out / "base.json").write_text(json.dumps(record | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match="whose weights have changed since; restore them"):
        open_model(str(out))


def test_one_that_cannot_be_trained_is_refused(made):
    refused(of(made, tokens=5000), r"the soft prompt has 5000 tokens, but data.sequence_length leaves 2016 of")
    refused(of(made, tokens=len(RULES) + 1, start="prompt", text=RULES), f"tokens is 15 but its text has {len(RULES)}")
    random = replace(made, student=replace(made.student, source="random"), teacher=None)
    random = replace(random, data=replace(made.data, tokenizer="bytes", teacher_view=""))
    refused(random, "student.soft_prompt freeze the rest of a model, but its source is 'random'")
    with pytest.raises(UserError, match="student.soft_prompt is trained alone; leave out student.lora"):
        replace(made, student=replace(made.student, lora=Lora(rank=2)))
    with pytest.raises(UserError, match="teacher.soft_prompt is set, but a teacher is not trained"):
        replace(made, teacher=ModelSpec(source="x", soft_prompt=SoftPrompt(2)))


@pytest.mark.slow
def test_a_model_behind_a_soft_prompt_can_teach(made, trained, home):
    """The teacher is the run, so a student that starts at the run's own soft prompt is at no distance from it."""
    _, run, _ = trained
    twice = replace(made, student=replace(made.student, source=str(run)))
    refused(twice, "has a soft prompt, which is for a teacher or generation; name its base")
    taught = replace(made, teacher=ModelSpec(source=str(run)), student=ModelSpec(source=made.teacher.source))
    taught = replace(taught, data=replace(made.data, teacher_view="", student_view="{{ prompt }}: "))
    job = build(taught)
    frozen = job.frozen()
    assert SOFT_PROMPT in frozen["teacher"]
    assert divergence(job, job.start()) > 1e-4
    assert train(taught, home / "by_soft")["kl_after"] >= 0
