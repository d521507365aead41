"""Training a part of a student: nothing is kept for what is frozen, any placement agrees, and the run exports whole."""

# ruff: noqa: F811

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_run
from test_build import config, directory, exported, refused, taught_by  # noqa: F401

from kdjax.build import build
from kdjax.checkpoint import Checkpoints
from kdjax.errors import UserError
from kdjax.jobs import evaluate_run, export_run
from kdjax.models import Model, ModelSpec, lora, open_model, parameter_count
from kdjax.models.config import Lora
from kdjax.models.paths import nested, parameter_paths
from kdjax.sharding import MeshConfig
from kdjax.step import gradient, student_params
from kdjax.train import train

home = tiny_run.home
RANK = Lora(rank=2, alpha=6.0)
MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8}, {"data": 1, "tensor": 8}, {"placement": "pmap"})


def adapted(config, directory, **spec):
    """A student of the teacher's last layer, of which only adapters are trained unless `spec` says otherwise."""
    return taught_by(config, directory, **{"source": "teacher", "keep_layers": (1,), "lora": RANK, **spec})


def test_nothing_is_kept_for_what_is_frozen(config, directory):
    job = build(adapted(config, directory))
    state, frozen = job.abstract_state, job.frozen()
    assert {path.rpartition("/")[2] for path in parameter_paths(state.params["student"])} == {"lora_a", "lora_b"}
    trained = parameter_count(state.params["student"])
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trained
    assert parameter_count(frozen["student"]) == parameter_count(job.student.file.tensors)
    gradients = jax.eval_shape(
        lambda state, frozen, batch: gradient(job.recipe, state, frozen, batch)[0], state, frozen, next_batch(job)
    )
    assert jax.tree.structure(gradients) == jax.tree.structure(state.params)


def next_batch(job):
    return job.place.put_batch(next(job.data.train(None))[0])


def test_a_part_and_adapters_are_trained_together(config, directory):
    job = build(adapted(config, directory, trained=("final_norm", "layers/mlp_norm")))
    paths = parameter_paths(job.start().params["student"])
    assert {path for path in paths if "lora" not in path} == {"final_norm/scale", "layers/mlp_norm/scale"}
    assert any("lora" in path for path in paths)
    assert "final_norm" not in job.frozen()["student"]


def test_a_copy_of_the_teacher_shares_its_arrays(config, directory):
    frozen = build(adapted(config, directory, keep_layers=())).frozen()
    of_teacher, of_student = map(parameter_paths, (frozen["teacher"], frozen["student"]))
    assert all(of_teacher[path] is leaf for path, leaf in of_student.items())
    other = build(adapted(config, directory, keep_layers=(), dtype="bfloat16")).frozen()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(other["student"])} == {"bfloat16"}


def first_gradient(config):
    job = build(config)
    state = job.start()
    moved = {
        path: leaf + 0.1 if path.endswith("lora_b") else leaf
        for path, leaf in parameter_paths(state.params["student"]).items()
    }
    state = replace(state, params=state.params | {"student": nested(moved)})
    of = job.place.compile_sums(lambda state, frozen, batch: gradient(job.recipe, state, frozen, batch))
    gradients, metrics = of(state, job.frozen(), next_batch(job))
    return jax.device_get(gradients["student"]), float(metrics["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_trap_4_adapters_have_one_gradient_on_any_mesh(config, directory, mesh):
    made = adapted(config, directory, keep_layers=())
    want, loss = first_gradient(replace(made, mesh=MeshConfig(data=8), microbatches=1))
    got, loss_of_mesh = first_gradient(replace(made, mesh=MeshConfig(**mesh)))
    assert loss_of_mesh == pytest.approx(loss, rel=1e-5)
    for path, leaf in parameter_paths(want).items():
        assert np.linalg.norm(leaf) > 0
        np.testing.assert_allclose(parameter_paths(got)[path], leaf, atol=1e-5 * np.linalg.norm(leaf), err_msg=path)


@pytest.mark.slow
def test_gradients_of_adapters_are_those_of_the_kernels_projected(config, directory):
    """By the chain rule dL/db = s·aᵀ·dL/dW and dL/da = s·dL/dW·bᵀ, dL/dW being that of training all weights."""
    made = adapted(config, directory, keep_layers=())
    state = build(made).start()
    student = {
        path: leaf + 0.1 if path.endswith("lora_b") else leaf
        for path, leaf in parameter_paths(state.params["student"]).items()
    }
    got, _ = first_gradient(made)
    whole = build(replace(made, student=replace(made.student, lora=Lora())))
    kernels = lora.merged(whole.student.file, jax.device_get(nested(student)), RANK).tensors
    params = {"student": jax.tree.map(lambda x: x.all(), kernels), "projections": {}}
    of = jax.jit(lambda state, frozen, batch: gradient(whole.recipe, state, frozen, batch)[0])
    full = of(replace(whole.start(), params=params), whole.frozen(), next_batch(whole))["student"]
    for name in ("up", "down"):
        a, b = (np.asarray(student[f"layers/mlp/{name}/lora_{which}"], np.float64) for which in "ab")
        dw, scale = np.asarray(full["layers"]["mlp"][name]["kernel"], np.float64), RANK.alpha / RANK.rank
        mine = got["layers"]["mlp"][name]
        np.testing.assert_allclose(
            mine["lora_b"], scale * a.swapaxes(1, 2) @ dw, atol=1e-5 * np.abs(mine["lora_b"]).max()
        )
        np.testing.assert_allclose(
            mine["lora_a"], scale * dw @ b.swapaxes(1, 2), atol=1e-5 * np.abs(mine["lora_a"]).max()
        )


@pytest.fixture(scope="module")
def trained(config, exported, home, tmp_path_factory):
    """A run of adapters, what it was made with, and its base's directory."""
    base = shutil.copytree(exported, tmp_path_factory.mktemp("base") / "model")
    made = adapted(config, base)
    run = home / "adapted"
    return made, run, train(made, run), base


def test_a_run_of_adapters_exports_what_it_has_trained(trained, tmp_path):
    made, run, summary, _ = trained
    job = build(made)
    with Checkpoints(run / "checkpoints", made.checkpoint, job.frozen_names()) as checkpoints:
        state = checkpoints.restore(job.abstract_state).state
    batch = next_batch(job)
    own = job.student.model.apply(student_params(job.recipe, state.params, job.frozen()), batch.student)
    directory = export_run(str(run), tmp_path / "out")
    file = open_model(str(directory))
    assert file.config == job.student.model.config
    out = Model(file.config).apply(jax.tree.map(lambda x: x.all(), file.tensors), batch.student)
    np.testing.assert_allclose(out.hidden_BTD, own.hidden_BTD, atol=2e-5)
    assert summary["parameters_trained"] < summary["parameters_student"]
    assert evaluate_run(run)["kl"] == pytest.approx(summary["kl_after"], rel=1e-3)


def test_going_on_is_exact(trained, tmp_path):
    made, run, _, _ = trained
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "4")
    train(made, copy)
    losses = [[row["loss"] for row in tiny_run.rows(where) if "loss" in row] for where in (run, copy)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_base_that_is_gone_or_has_changed_is_refused(trained, tmp_path):
    made, run, _, base = trained
    copy = shutil.copytree(run, tmp_path / "run")
    record = json.loads((copy / "base.json").read_text())
    moved = shutil.copytree(base, tmp_path / "moved")
    (copy / "base.json").write_text(json.dumps(record | {"spec": record["spec"] | {"source": str(moved)}}))
    open_model(str(copy))
    (copy / "base.json").write_text(json.dumps(record | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match="whose weights have changed since; restore them"):
        open_model(str(copy))
    (copy / "base.json").write_text(json.dumps(record | {"spec": record["spec"] | {"source": str(tmp_path / "no")}}))
    with pytest.raises(UserError, match=r"has trained a part of .*, which is wanted too: no model"):
        open_model(str(copy))
    (copy / "base.json").write_text("{}")
    with pytest.raises(UserError, match="does not say what the run was trained on"):
        open_model(str(copy))


@pytest.mark.slow
def test_a_run_that_saved_nothing_leaves_no_base_behind(config, directory, home):
    made, run = taught_by(config, directory, source="teacher"), home / "anew"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "base.json").write_text("{}")
    train(replace(made, steps=3), run)
    assert not (run / "base.json").exists()
    open_model(str(run))


def test_what_cannot_be_frozen_is_refused(config, directory):
    refused(replace(config, student=replace(config.student, lora=RANK)), "its source is 'random'; name a model")
    refused(adapted(config, directory, trained=("layers/mpl",)), "trained names 'layers/mpl'.*did you mean")
    with pytest.raises(UserError, match="a teacher is not trained; set the student's"):
        replace(config, teacher=ModelSpec(lora=RANK))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_report_says_what_quantising_the_teacher_costs(config, directory, home, kind):
    made = taught_by(config, directory)
    made = replace(made, teacher=replace(made.teacher, quantize=kind))
    job, summary = build(made), train(made, home / kind)
    whole, kept = build(replace(made, teacher=replace(made.teacher, quantize="none"))).frozen(), job.frozen()
    total = tokens = same = 0
    for batch in job.data.evaluation(made.batch_size):
        hidden = [job.teacher.model.apply(tree["teacher"], batch.student).hidden_BTD for tree in (whole, kept)]
        heads = [job.teacher.model.head(tree["teacher"]).w_DV for tree in (whole, kept)]
        logits = [np.asarray(h, np.float64) @ np.asarray(w, np.float64) for h, w in zip(hidden, heads, strict=True)]
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
        at = np.asarray(batch.student_rows_BR)[:, :, None]
        p, q = (np.take_along_axis(x, at, 1) for x in (p, q))
        weight = np.asarray(batch.kd_weight_BR, np.float64)
        total += (weight * (np.exp(p) * (p - q)).sum(-1)).sum()
        same += (weight * (p.argmax(-1) == q.argmax(-1))).sum()
        tokens += weight.sum()
    assert summary["kl_quantized"] == pytest.approx(total / tokens, rel=1e-3) and total > 0
    assert summary["agreement_quantized"] == pytest.approx(same / tokens, abs=1e-6)
    assert summary["bytes_teacher"] < 0.45 * 4 * summary["parameters_teacher"]
    assert summary["parameters_teacher"] == parameter_count(whole["teacher"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"placement": "pmap"}], ids=str)
def test_a_quantised_teacher_teaches_the_same_anywhere(config, directory, mesh):
    made = taught_by(config, directory)
    made = replace(made, teacher=replace(made.teacher, quantize="int4"), mesh=MeshConfig(data=8))
    (want, loss), (got, elsewhere) = first_gradient(made), first_gradient(replace(made, mesh=MeshConfig(**mesh)))
    assert elsewhere == pytest.approx(loss, rel=1e-5)
    for path, leaf in parameter_paths(want).items():
        np.testing.assert_allclose(
            parameter_paths(got)[path], leaf, atol=1e-5 * np.linalg.norm(leaf) + 1e-8, err_msg=path
        )


def test_quantised_weights_are_another_teacher(config, directory):
    made = taught_by(config, directory)
    kinds = [replace(made, teacher=replace(made.teacher, quantize=kind)) for kind in ("none", "int8", "int4")]
    assert len({build(each).frozen_names()["teacher"] for each in kinds}) == 3


def test_what_cannot_be_quantised_is_refused(config):
    refused(
        replace(config, teacher=replace(config.teacher, quantize="int8")),
        "teacher.quantize is set, but its source is 'random'",
    )
    with pytest.raises(UserError, match="student.quantize or student.offload is set, but a student is trained"):
        replace(config, student=replace(config.student, quantize="int8"))
