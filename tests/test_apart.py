"""A teacher on a mesh of its own: the same gradients, nothing of it where the student lies, a batch ahead of it."""

# ruff: noqa: F811

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from jax import lax
from test_build import config, directory, exported, refused, taught_by  # noqa: F401
from test_context import LONG_RULES, made, ruled  # noqa: F401
from test_recovery import ANSWERS

import kdjax.job
from kdjax.build import build
from kdjax.losses import Feature
from kdjax.models import byte_count
from kdjax.models.paths import parameter_paths
from kdjax.recovery import recovery
from kdjax.sharding import ON_HOST, MeshConfig, TeacherMeshConfig, placements
from kdjax.step import gradient
from kdjax.train import train

home = tiny_run.home

INNER = (Feature("hidden_mse", 0.5, ((0, 1), (1, 1))), Feature("relation_vv", 1.0, ((1, 1),), relation_heads=1))
MESHES = {
    "4 of 8 devices": (MeshConfig(fsdp=2), TeacherMeshConfig(devices=4, tensor=2)),
    "2 of 8 devices": (MeshConfig(data=2, tensor=3), TeacherMeshConfig(devices=2, data=1, context=2)),
    "all, otherwise": (MeshConfig(fsdp=4), TeacherMeshConfig(devices=-1, tensor=2, fsdp=2)),
}
FIRST = "4 of 8 devices"
SLOW = 200_000_000
"""Turns of a loop, some seconds."""
OFFLOADED = {
    "within the step": lambda config: replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2)),
    "apart, in 8 bits": lambda config: apart(replace(config, teacher=replace(config.teacher, quantize="int8"))),
}
KINDS = {
    "text and inner layers": lambda config, made: replace(
        config, objective=replace(config.objective, alpha=0.3, features=INNER)
    ),
    "prompts, a quantised teacher": lambda config, made: replace(
        ruled(made, LONG_RULES), teacher=replace(made.teacher, quantize="int8")
    ),
}


def apart(config, mesh=MeshConfig(fsdp=2), teacher_mesh=TeacherMeshConfig(devices=4, tensor=2)):  # noqa: B008
    return replace(config, mesh=mesh, teacher_mesh=teacher_mesh)


def gradients(job, frozen=None):
    """Of two batches, and what evaluation says of the second: numpy."""
    state, frozen, found = job.start(), frozen or job.frozen(), []
    batches = job.data.train(None, prefetch=0)
    of = jax.jit(partial(gradient, job.recipe))
    for _ in range(2):
        batch, _ = next(batches)
        found.append(of(state, *job.given(frozen, batch)))
    sums = job.sums(state.params, *job.given(frozen, batch))
    numbers = partial(jax.tree.map, float)
    return [(jax.tree.map(np.asarray, tree), numbers(parts)) for tree, parts in found], numbers(sums)


@pytest.mark.parametrize("kind", [next(iter(KINDS)), *(pytest.param(k, marks=pytest.mark.slow) for k in [*KINDS][1:])])
@pytest.mark.parametrize(
    "mesh", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in MESHES if name != FIRST)]
)
def test_gradients_are_those_of_a_teacher_within_the_step(config, made, mesh, kind):
    whole = KINDS[kind](config, made)
    (want, sums), (got, own) = (gradients(build(each)) for each in (whole, apart(whole, *MESHES[mesh])))
    for (ours, our_parts), (theirs, their_parts) in zip(got, want, strict=True):
        assert our_parts == pytest.approx(their_parts, rel=2e-5, abs=1e-6)
        floor = 1e-6 * optax.global_norm(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.linalg.norm(a - b) <= max(2e-5 * np.linalg.norm(b), floor)
    assert own == pytest.approx(sums, rel=2e-5, abs=1e-5)


def test_of_the_teacher_only_its_head_and_hidden_states_come_to_the_student(config):
    job = build(apart(replace(config, objective=replace(config.objective, chunk_tokens=8))))
    frozen, (batch, _) = job.frozen(), next(job.data.train(None, prefetch=0))
    students, its = (set(place.mesh.devices.flat) for place in (job.place, job.teacher_place))
    assert len(students) == len(its) == 4 and not students & its
    assert all(leaf.devices() == its for leaf in jax.tree.leaves(frozen["teacher"]))
    assert all(leaf.devices() == students for leaf in jax.tree.leaves(frozen["teacher_head"]))
    given, placed = job.given(frozen, batch)
    assert set(given) == {"teacher_head"} and byte_count(given) < byte_count(frozen["teacher"])
    said = placed.signal["said"]["hidden"]
    assert said.shape == (*batch.student_rows_BR.shape, 16) and said.devices() == students
    step, speak = (each.compile().as_text() for each in job.lowered(job.abstract_state, frozen, placed))
    logits = re.compile(r"\[(?:\d+,)*(?:264|132)\]")  # over the vocabulary, or a device's half of it
    assert logits.search(step) and not re.search(r"\[(?:\d+,)*32,(?:264|132)\]", speak)
    assert "/teacher/" in speak and "/teacher/" not in step


def test_the_teacher_is_done_with_the_next_batch_while_the_student_takes_its_step(config, monkeypatch):
    """What it says of it lies on the student's devices before a step ends that takes much longer than both models.

    No computation has a collective here: those of one process's CPU devices run one after the other.
    """
    step = kdjax.job.step

    def slow(state, frozen, batch, recipe):
        state, metrics = step(state, frozen, batch, recipe)
        return state, metrics | {"loss": lax.fori_loop(0, SLOW, lambda _, x: jnp.sin(x), metrics["loss"])}

    monkeypatch.setattr(kdjax.job, "step", slow)
    job = build(apart(config, MeshConfig(), TeacherMeshConfig(devices=7, data=1, tensor=7)))  # 7 copies of the teacher
    frozen, batches, state = job.frozen(), job.data.train(None, prefetch=0), job.start()
    first, second = (next(batches)[0] for _ in range(2))
    state, _ = jax.block_until_ready(job.step(state, *job.given(frozen, first)))  # all is compiled now
    state, metrics = job.step(state, *job.given(frozen, first))
    jax.block_until_ready(job.given(frozen, second)[1].signal)
    assert not metrics["loss"].is_ready()
    jax.block_until_ready(metrics)


def test_where_the_teacher_only_measures_training_does_not_ask_it(config):
    job = build(apart(replace(config, objective=replace(config.objective, alpha=1.0))))
    frozen, (batch, _) = job.frozen(), next(job.data.train(None, prefetch=0))
    frozen_of_step, placed = job.given(frozen, batch, trains=True)
    assert placed.signal is None and set(frozen_of_step) == {"teacher_head"}
    _, metrics = job.step(job.start(), frozen_of_step, placed)
    assert "kd" not in metrics and metrics["ce"] > 0
    assert len(job.lowered(job.abstract_state, frozen, placed)) == 1
    assert job.given(frozen, batch)[1].signal is not None


@pytest.mark.slow
def test_a_run_ends_with_the_figures_of_one_whose_teacher_is_within_the_step(config, tmp_path):
    wanted, got = (train(each, tmp_path / name) for name, each in (("within", config), ("apart", apart(config))))
    for name in ("kl_before", "kl_after", "ce_teacher", "agreement_after"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-4), name
    assert got["continuations"] == wanted["continuations"]


@pytest.mark.slow
def test_what_is_recovered_is_measured_with_a_teacher_apart_too(made):
    rows = replace(made, data=replace(made.data, eval_tokens=64))
    asked = replace(ANSWERS, unrelated=())
    jobs = [build(each) for each in (replace(rows, answers=asked), apart(replace(rows, answers=asked)))]
    wanted, got = (recovery(job, job.start().params, job.frozen()) for job in jobs)
    assert got["recovered"] == pytest.approx(wanted["recovered"], abs=1e-5)
    assert got["recovered_own"] == pytest.approx(wanted["recovered_own"], abs=1e-5)
    assert got["behaviour"] == wanted["behaviour"]


@pytest.mark.parametrize("place", ["within the step", pytest.param("apart, in 8 bits", marks=pytest.mark.slow)])
def test_a_teacher_in_the_hosts_memory_says_the_same(config, directory, place):
    whole = OFFLOADED[place](taught_by(config, directory))
    there = replace(whole, teacher=replace(whole.teacher, offload=True))
    job = build(there)
    frozen = job.frozen()
    kinds = {
        path: {x.sharding.memory_kind for x in jax.tree.leaves(leaf)}
        for path, leaf in parameter_paths(frozen["teacher"]).items()
    }
    assert kinds.pop("layers/mlp/up/kernel") == kinds.pop("layers/attention/out/kernel") == {ON_HOST}
    assert kinds["embed/embedding"] == kinds["layers/mlp_norm/scale"] == {"device"}
    (want, sums), (got, own) = gradients(build(whole)), gradients(job, frozen)
    for ours, theirs in zip(jax.tree.leaves((got, own)), jax.tree.leaves((want, sums)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_teacher_that_cannot_lie_in_the_hosts_memory_is_refused(config):
    refused(
        replace(config, mesh=MeshConfig(placement="pmap"), teacher=replace(config.teacher, offload=True)), "one stack"
    )


@pytest.mark.parametrize(
    ("mesh", "teacher", "said"),
    [
        ({}, {"devices": 8}, "teacher_mesh.devices is 8 of 8; wanted .* at least one device of each left"),
        ({}, {"devices": -2}, "teacher_mesh.devices is -2; wanted -1, 0 or a number"),
        ({}, {"tensor": 2}, "teacher_mesh is set, but teacher_mesh.devices is 0"),
        ({"placement": "pmap"}, {"devices": 2}, "mesh.placement is pmap, where the teacher runs within the step"),
        ({}, {"devices": 2, "placement": "pmap"}, "teacher_mesh.placement is pmap"),
        ({}, {"devices": 4, "tensor": 3}, "tensor=3 does not fill 4 devices"),
    ],
)
def test_meshes_that_cannot_be_are_refused(mesh, teacher, said):
    with pytest.raises(kdjax.errors.UserError, match=said):
        placements(MeshConfig(**mesh), TeacherMeshConfig(**teacher))


def test_a_batch_that_does_not_split_on_the_teachers_mesh_is_refused(config):
    refused(apart(config, MeshConfig(), TeacherMeshConfig(devices=3)), "batch_size 16 does not split over 5 devices")
    halves = apart(replace(config, batch_size=4), MeshConfig(data=2, tensor=2), TeacherMeshConfig(devices=4))
    refused(halves, r"batch_size 4 does not split over 4 devices .* and 2 microbatches; use 8$")


def test_a_teacher_that_is_not_there_or_follows_has_no_mesh(config, directory):
    follows = {"teacher_follows": "average", "student": replace(config.student, source="teacher")}
    for wrong in ({"teacher": None}, follows):
        with pytest.raises(kdjax.errors.UserError, match="teacher_mesh.devices gives the teacher a mesh of its own"):
            replace(taught_by(config, directory), **wrong, teacher_mesh=TeacherMeshConfig(devices=4))
