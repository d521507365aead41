"""The one step: what it computes is the same on one device, any mesh, pmap, with accumulation, and packed."""

import functools
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from kdjax.errors import UserError
from kdjax.evaluate import sums_of
from kdjax.losses import Feature, ObjectiveConfig
from kdjax.losses.features import tapped
from kdjax.models import Model, ModelConfig, attend
from kdjax.shapes import Batch, View
from kdjax.sharding import MeshConfig, placement
from kdjax.step import Recipe, _row_keys, gradient, init_state, loss_sums, step
from kdjax.teacher import live_teacher, no_teacher

B, T, V = 16, 14, 96
STUDENT = ModelConfig(vocab_size=V, width=32, heads=4, kv_heads=2, head_width=8, mlp_width=48)
TEACHER = ModelConfig(vocab_size=V, width=24, layers=3, heads=2, kv_heads=2, head_width=12, mlp_width=32)
MOE = replace(STUDENT, experts=4, experts_per_token=2)
OBJECTIVE = ObjectiveConfig(alpha=0.3, temperature=2.0, chunk_tokens=8)
INNER = replace(
    OBJECTIVE,
    features=(
        Feature("hidden_mse", 50.0, layers=((0, 0), (1, 2))),
        Feature("hidden_cosine", 0.7, layers=((1, 2),)),
        Feature("relation_qq", 200.0, layers=((1, 2),), relation_heads=2),
        Feature("relation_kk", 200.0, layers=((1, 2),), relation_heads=4),
        Feature("relation_vv", 200.0, layers=((0, 1), (1, 2)), relation_heads=2),
    ),
)
"""All losses of inner layers that add up, so weighted that the gradients of small random models are of one size."""
OBJECTIVES = [
    pytest.param(OBJECTIVE, id="logits"),
    pytest.param(INNER, id="inner layers", marks=pytest.mark.slow),
]
PROJECTIONS = ("hidden_mse_0_0", "hidden_mse_1_2", "hidden_cosine_1_2")

PLACES = {
    "data 8": ({"data": 8}, 1),
    "data 8, 2 microbatches": ({"data": 8}, 2),
    "data 2, fsdp 2, tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
    "fsdp 4, tensor 2, 4 microbatches": ({"data": 1, "fsdp": 4, "tensor": 2}, 4),
    "fsdp 8": ({"data": 1, "fsdp": 8}, 1),
    "tensor 8": ({"data": 1, "tensor": 8}, 1),
    "context 2, data 4": ({"data": 4, "context": 2}, 1),
    "context 2, fsdp 2, tensor 2, 2 microbatches": ({"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, 2),
    "data 4, expert 2": ({"data": 4, "expert": 2}, 1),
    "expert 4, tensor 2, 2 microbatches": ({"data": 1, "expert": 4, "tensor": 2}, 2),
    "fsdp 2, expert 2, tensor 2": ({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, 1),
    "expert 8": ({"data": 1, "expert": 8}, 1),
    "pmap": ({"placement": "pmap"}, 1),
    "pmap, 2 microbatches": ({"placement": "pmap"}, 2),
}


EVERY_TIME = {"data 2, fsdp 2, tensor 2", "pmap, 2 microbatches"}


def _placements(names, every_time=EVERY_TIME):
    """Return the names as cases; those that only repeat what others show are slow, since each compiles anew."""
    return [name if name in every_time else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _uneven_batch(seed=0):
    """Return a batch whose rows differ much in length, with a prompt part of weight 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    lengths = rng.integers(2, T + 1, B)
    position = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    inside = position < lengths[:, None]
    segment = inside.astype(np.int32)
    weight = (inside & (position + 1 < lengths[:, None])).astype(np.float32)
    kd = weight * (position >= rng.integers(0, 3, B)[:, None])
    targets = np.where(weight > 0, np.roll(tokens, -1, 1), 0).astype(np.int32)
    return Batch(View(tokens, segment, position * inside), position, targets, weight, kd.astype(np.float32))


BATCHES = [_uneven_batch(seed) for seed in range(5)]


def _recipe(
    place=None, microbatches=1, optimizer=None, student=STUDENT, with_teacher=True, objective=OBJECTIVE, teacher=TEACHER
):
    place = place or placement(MeshConfig(data=1), jax.devices()[:1])
    across = {"attention": place.attention(attend), "layout": place.constrain, "dispatch": place.dispatch}
    teacher = Model(teacher, **across)
    widths = (student.width, teacher.config.width)
    return Recipe(
        model=Model(student, **across),
        objective=objective,
        optimizer=optimizer or optax.sgd(0.5),
        signal_of=live_teacher(teacher, tapped(objective.features, 1)) if with_teacher else no_teacher,
        microbatches=microbatches,
        shard=place.shard_loss,
        axis_name=place.axis_name,
        projections=dict.fromkeys(PROJECTIONS, widths) if objective.features and widths[0] != widths[1] else {},
    )


@functools.cache
def _init(model, seed):
    return jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(seed)))


def _start(recipe, place):
    """Return state and frozen trees, each where it belongs."""
    teacher = Model(TEACHER)
    state = init_state(recipe, _init(Model(recipe.model.config), 1))
    frozen = {"teacher": _init(teacher, 2)}
    where = place.state_shardings(state, {"student": recipe.model.logical_axes()})
    frozen_where = place.state_shardings(frozen, {"teacher": teacher.logical_axes()})
    if jax.process_count() > 1:
        _meet("all is initialised")
    return jax.device_put(state, where), jax.device_put(frozen, frozen_where), where


KEPT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, _, params=None: (gradients, gradients)
)
"""Keeps the gradients that it is given in its state, and gives them on."""


def _run(mesh, microbatches, batches=BATCHES, student=STUDENT, devices=None, objective=OBJECTIVE):
    """Return the metrics and summed gradients of each step of SGD and the parameters at the end, as numpy."""
    place = placement(MeshConfig(**mesh), devices)
    optimizer = optax.chain(KEPT, optax.sgd(0.5))
    recipe = _recipe(place, microbatches, optimizer, student=student, objective=objective)
    state, frozen, where = _start(recipe, place)
    do, logged, gradients = place.compile_step(partial(step, recipe=recipe), where), [], []
    part, parts = place.reading
    own = [place.put_batch(jax.tree.map(lambda x: np.split(x, parts)[part], batch)) for batch in batches]
    if jax.process_count() > 1:
        do = do.lower(state, frozen, own[0]).compile()
        _meet("the step is compiled")
    for batch in own:
        state, metrics = do(state, frozen, batch)
        logged.append({name: float(value) for name, value in metrics.items()})
        gradients.append(_whole(state.opt_state[0]))
    return logged, gradients, _whole(state.params)


def _meet(name):
    """Wait for the other processes, whose compilers may be slower: gloo's collectives wait 30 s and no longer."""
    global_state.client.wait_at_barrier(name, timeout_in_ms=300_000)


def _whole(tree):
    """Return arrays as numpy, wherever their parts lie."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def agree(got, want):
    """Compare two runs to 1e-5: each number, and each tensor by its norm, from 1e-6 of the norm of all on.

    Parameters too: they are those of SGD. Adam would turn the rounding of a gradient that should be 0 into a step.
    """
    for ours, theirs in zip(got[0], want[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for ours, theirs in zip([*got[1], got[2]], [*want[1], want[2]], strict=True):
        floor = 1e-6 * optax.global_norm(theirs)
        for path, exact in jax.tree.leaves_with_path(theirs):
            error = np.linalg.norm(exact - functools.reduce(lambda tree, key: tree[key.key], path, ours))
            assert error <= max(1e-5 * np.linalg.norm(exact), floor), jax.tree_util.keystr(path)


def _gradient(recipe, batch, params=None):
    """Return gradient and parts of a batch on one device."""
    state, frozen, _ = _start(recipe, placement(MeshConfig(data=1), jax.devices()[:1]))
    state, frozen = (state, frozen) if params is None else (init_state(recipe, params), {"teacher": params})
    return jax.jit(partial(gradient, recipe))(state, frozen, batch)


def _close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=2e-7)


ALONE = {"mesh": {"data": 1}, "microbatches": 1, "devices": jax.devices()[:1]}


@pytest.fixture(scope="module")
def alone():
    return {rate: _run(**ALONE, student=replace(STUDENT, dropout=rate)) for rate in (0.0, 0.2)}


@pytest.mark.parametrize("name", _placements(PLACES))
def test_trap_4_every_placement_and_accumulation_gives_the_same(name, alone):
    """Losses, summed gradients and, under SGD, parameters of five steps on rows of uneven length."""
    agree(_run(*PLACES[name]), alone[0.0])


@pytest.fixture(scope="module")
def alone_with_inner_layers():
    return _run(**ALONE, batches=BATCHES[:2], objective=INNER)


@pytest.mark.parametrize("name", _placements(PLACES, ("data 2, fsdp 2, tensor 2",)))
def test_trap_4_losses_of_inner_layers_add_up_likewise(name, alone_with_inner_layers):
    logged, gradients, params = _run(*PLACES[name], BATCHES[:2], objective=INNER)
    agree((logged, gradients, params), alone_with_inner_layers)
    assert all(logged[0][feature.kind] > 0 for feature in INNER.features)
    start = init_state(_recipe(objective=INNER), _init(Model(STUDENT), 1)).params["projections"]
    moved = [np.abs(params["projections"][name]["kernel"] - start[name]["kernel"]).max() for name in PROJECTIONS]
    assert min(moved) > 1e-4, "projections are trained"


@pytest.fixture(scope="module")
def alone_with_experts():
    return {
        weight: _run(**ALONE, batches=BATCHES[:2], student=MOE, objective=replace(OBJECTIVE, load_balance=weight))
        for weight in (0.0, 0.1)
    }


@pytest.mark.parametrize("name", _placements(PLACES, ("fsdp 2, expert 2, tensor 2",)))
def test_trap_4_experts_lie_anywhere(name, alone_with_experts):
    """On devices of their own or not (8 devices do not divide 4 experts), and part of each one's width on each.

    The load balance is one number of a microbatch (under pmap, of a device): left out where there are more.
    """
    mesh, microbatches = PLACES[name]
    weight = 0.0 if microbatches > 1 or "placement" in mesh else 0.1
    found = _run(mesh, microbatches, BATCHES[:2], MOE, objective=replace(OBJECTIVE, load_balance=weight))
    agree(found, alone_with_experts[weight])
    assert ("load_balance" in found[0][0]) == bool(weight)


@pytest.mark.slow
def test_the_load_balance_of_microbatches_counts_by_their_real_tokens():
    batch, objective = _uneven_batch(), replace(OBJECTIVE, load_balance=0.1)
    recipe = _recipe(student=MOE, objective=objective, microbatches=2)
    _, metrics = _gradient(recipe, batch)
    halves = [jax.tree.map(lambda x, a=a: x[a::2], batch) for a in range(2)]
    each = [_gradient(replace(recipe, microbatches=1), half)[1] for half in halves]
    real = [(half.student.segment_BT > 0).sum() for half in halves]
    wanted = sum(n * float(one["load_balance"]) for n, one in zip(real, each, strict=True)) / sum(real)
    np.testing.assert_allclose(float(metrics["load_balance"]), wanted, rtol=1e-5)
    without = _gradient(replace(recipe, objective=OBJECTIVE), batch)[1]["loss"]
    np.testing.assert_allclose(metrics["loss"] - without, (0.1 - 0.001) * wanted, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["data 2, fsdp 2, tensor 2", pytest.param("pmap, 2 microbatches", marks=pytest.mark.slow)]
)
def test_trap_27_dropout_is_drawn_by_global_row(name, alone):
    found = _run(*PLACES[name], student=replace(STUDENT, dropout=0.2))
    agree(found, alone[0.2])
    assert abs(found[0][0]["loss"] - alone[0.0][0][0]["loss"]) > 1e-4, "dropout is on"


@pytest.mark.slow
def test_trap_27_rows_and_steps_draw_differently():
    """Equal rows in one batch, and the same batch in two steps, get different masks."""
    recipe = _recipe(student=replace(STUDENT, dropout=0.5), optimizer=optax.sgd(0.0))
    batch = jax.tree.map(lambda x: np.repeat(x[:1], B, 0), _uneven_batch())
    row = partial(_row_losses, recipe, batch)
    first, second = row(0), row(1)
    assert len(set(first.tolist())) > B // 2 and not np.any(first == second)


def _row_losses(recipe, batch, number):
    """Return the loss of each row alone, with the masks that it gets within the whole batch."""
    state, frozen, _ = _start(recipe, placement(MeshConfig(data=1), jax.devices()[:1]))

    @jax.jit
    def loss_of(i):
        row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), (batch, _row_keys(recipe, number, B)))
        return loss_sums(recipe, state.params, frozen, *row)[0]

    return np.asarray([loss_of(i) for i in range(B)])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trap_14_packed_rows_give_the_gradient_of_their_examples(objective):
    """Two examples in one row, apart by segment, against one a row: teacher, student, loss and gradients."""
    rng = np.random.default_rng(3)
    lengths = [7, 5]
    tokens = [rng.integers(0, V, n).astype(np.int32) for n in lengths]

    def make(rows):
        """Return a batch of rows, each a list of examples."""
        fields = {name: np.zeros((len(rows), T), np.int32) for name in ("tokens", "segment", "position", "targets")}
        weight = np.zeros((len(rows), T), np.float32)
        for i, examples in enumerate(rows):
            at = 0
            for number, ids in enumerate(examples, 1):
                end = at + len(ids)
                fields["tokens"][i, at:end], fields["segment"][i, at:end] = ids, number
                fields["position"][i, at:end], weight[i, at : end - 1] = np.arange(len(ids)), 1
                fields["targets"][i, at : end - 1] = ids[1:]
                at = end
        picks = np.broadcast_to(np.arange(T, dtype=np.int32), weight.shape).copy()
        view = View(fields["tokens"], fields["segment"], fields["position"])
        return Batch(view, picks, fields["targets"], weight, weight)

    recipe = _recipe(objective=objective)
    results = [_gradient(recipe, make(rows)) for rows in ([tokens], [[tokens[0]], [tokens[1]]])]
    _close(results[0], results[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trap_2_padding_tokens_change_nothing(objective):
    batch = _uneven_batch()
    noise = np.random.default_rng(9).integers(0, V, (B, T)).astype(np.int32)
    other = replace(
        batch,
        student=replace(
            batch.student, tokens_BT=np.where(batch.student.segment_BT == 0, noise, batch.student.tokens_BT)
        ),
    )
    assert np.any(other.student.tokens_BT != batch.student.tokens_BT)
    recipe = _recipe(objective=objective)
    first, second = (_gradient(recipe, each) for each in (batch, other))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_trap_11_the_end_of_a_text_is_learnt_even_if_padding_is_the_same_token():
    """A target equal to the padding token has a gradient: weights decide, never token values."""
    batch = _uneven_batch()
    recipe = _recipe(with_teacher=False)
    rows, ends = batch.ce_weight_BR > 0, np.zeros_like(batch.targets_BR)
    ends[np.arange(B), rows.sum(1) - 1] = 1
    last = replace(
        batch, targets_BR=np.where(ends, 0, batch.targets_BR).astype(np.int32), ce_weight_BR=ends.astype(np.float32)
    )
    gradients, metrics = _gradient(recipe, last)
    assert metrics["ce_tokens"] == B
    assert np.abs(np.asarray(gradients["student"]["embed"]["embedding"])[0]).max() > 1e-3


def test_trap_13_teacher_has_no_dropout_and_no_gradient():
    teacher = Model(replace(TEACHER, dropout=0.5))
    signal_of, batch = live_teacher(teacher), jax.tree.map(jnp.asarray, _uneven_batch())
    frozen = {"teacher": _init(teacher, 2)}
    first, second = signal_of(frozen, batch), signal_of(frozen, batch)
    np.testing.assert_array_equal(first.hidden_ND, second.hidden_ND)
    total = lambda fz: jnp.sum(signal_of(fz, batch).hidden_ND) + jnp.sum(signal_of(fz, batch).head.w_DV)  # noqa: E731
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(jax.grad(total)(frozen)))


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counts():
    recipe = _recipe(optimizer=optax.adam(1e-2))
    place = placement(MeshConfig(data=1), jax.devices()[:1])
    state, frozen, where = _start(recipe, place)
    do = place.compile_step(partial(step, recipe=recipe), where)
    good = _uneven_batch()
    bad = replace(good, ce_weight_BR=np.where(np.arange(T)[None] == 0, np.nan, good.ce_weight_BR).astype(np.float32))
    state, _ = do(state, frozen, good)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    for number in (1, 2):
        state, metrics = do(state, frozen, bad)
        assert metrics["skipped_in_a_row"] == number and not np.isfinite(metrics["loss"])
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = do(state, frozen, good)
    assert (metrics["skipped_in_a_row"], metrics["skipped"], state.step) == (0, 2, 4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trap_26_the_whole_step_holds_no_logits_and_gathers_no_hidden_states(objective):
    """The 8-device module of a step: [tokens, V] exists for a chunk alone, and only parameters are gathered."""
    place = placement(MeshConfig(data=2, fsdp=4))
    recipe = _recipe(place, objective=objective)
    state, frozen, where = _start(recipe, place)
    do = place.compile_step(partial(step, recipe=recipe), where)
    module = do.lower(state, frozen, place.put_batch(_uneven_batch())).compile().as_text()
    assert re.search(rf"\[{OBJECTIVE.chunk_tokens},{V}\]", module), "a chunk's logits"
    local, whole = B // 8, B
    of_all_tokens = [f"[{n},{V}]" for n in (local * T, whole * T)] + [f"[{n},{T},{V}]" for n in (local, whole)]
    assert not [shape for shape in of_all_tokens if shape in module]
    gathered = set(re.findall(r"= \(?\w+(\[[\d,]*\])[^\n]* all-gather", module))
    assert gathered and not [shape for shape in gathered if str(T) in re.findall(r"\d+", shape)]


def test_the_step_is_compiled_once():
    recipe, place = _recipe(), placement(MeshConfig(data=1), jax.devices()[:1])
    state, frozen, where = _start(recipe, place)
    traced = []

    def counted(*arguments):
        traced.append(1)
        return step(*arguments, recipe=recipe)

    do = place.compile_step(counted, where)
    for seed in range(3):
        state, _ = do(state, frozen, place.put_batch(_uneven_batch(seed)))
    assert len(traced) == 1


def test_distilling_into_a_copy_of_the_teacher_starts_at_zero():
    """But for logits' last bits, which compilers may round otherwise on each side: KL is of second order in them."""
    recipe = replace(_recipe(student=TEACHER), objective=ObjectiveConfig(0.0))
    params = _init(Model(TEACHER), 2)
    gradients, metrics = _gradient(recipe, _uneven_batch(), params)
    assert metrics["kd"] < 1e-12 and metrics["agreement"] == pytest.approx(1)
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradients)) < 1e-6


def test_losses_of_inner_layers_are_means_over_their_own_tokens():
    """In float64 numpy: hidden states over the divergence's weights, relations over all real tokens."""
    batch, params = _uneven_batch(), [_init(Model(TEACHER), seed) for seed in (1, 2)]
    student, teacher = (
        jax.tree.map(np.float64, Model(TEACHER).apply(p, batch.student, taps=("hidden", "v")).taps) for p in params
    )
    features = (Feature("hidden_mse", 0.5, ((0, 1), (2, 2))), Feature("relation_vv", 3.0, ((1, 2),), relation_heads=1))
    recipe = _recipe(student=TEACHER, objective=replace(OBJECTIVE, features=features))
    _, metrics = _gradient(recipe, batch)
    mse_BT = sum(np.mean((student["hidden"][s] - teacher["hidden"][t]) ** 2, -1) for s, t in ((0, 1), (2, 2))) / 2
    hidden_mse = np.sum(batch.kd_weight_BR * mse_BT) / batch.kd_weight_BR.sum()
    assert metrics["hidden_mse"] == pytest.approx(hidden_mse, rel=1e-5)
    lengths, kl = batch.student.segment_BT.sum(1), 0.0
    for b, length in enumerate(lengths):
        for t in range(length):
            q, p = (
                v[b, t].reshape(-1) @ v[b, : t + 1].reshape(t + 1, -1).T for v in (student["v"][1], teacher["v"][2])
            )
            q, p = (np.exp(x / np.sqrt(24)) / np.exp(x / np.sqrt(24)).sum() for x in (q, p))
            kl += np.sum(p * np.log(p / q))
    assert metrics["relation_vv"] == pytest.approx(kl / lengths.sum(), rel=1e-4)
    assert metrics["real_tokens"] == lengths.sum()
    total = 0.3 * metrics["ce"] + 0.7 * metrics["kd"] + 0.5 * hidden_mse + 3.0 * kl / lengths.sum()
    assert metrics["loss"] == pytest.approx(float(total), rel=1e-5)


@pytest.mark.slow
def test_inner_layers_of_a_copy_of_the_teacher_start_at_zero():
    recipe = _recipe(student=TEACHER, objective=replace(INNER, features=tuple(_last(f) for f in INNER.features)))
    _, metrics = _gradient(recipe, _uneven_batch(), _init(Model(TEACHER), 2))
    assert all(0 <= metrics[feature.kind] < 1e-12 for feature in INNER.features)


def _last(feature):
    return replace(feature, layers=((2, 2),))


def _with_a_view_of_its_own(batch):
    """The batch, its teacher seeing two more tokens (of another segment) before each example."""
    before = lambda x_BT, value: np.pad(x_BT, ((0, 0), (2, 0)), constant_values=value)  # noqa: E731
    view = batch.student
    own = View(before(view.tokens_BT, 5), before(view.segment_BT, 9), before(view.position_BT, 0))
    return replace(batch, teacher=own, teacher_rows_BR=batch.student_rows_BR + 2)


def test_hidden_states_of_two_views_are_compared_at_their_own_rows():
    recipe = _recipe(student=TEACHER, objective=replace(OBJECTIVE, features=(_last(Feature()),)))
    _, metrics = _gradient(recipe, _with_a_view_of_its_own(_uneven_batch()), _init(Model(TEACHER), 2))
    assert metrics["hidden_mse"] < 1e-10


def test_relations_of_two_views_and_layers_of_no_teacher_are_refused():
    with pytest.raises(UserError, match="'relation_qq' wants one view of a batch, but the teacher has its own"):
        _gradient(_recipe(objective=INNER), _with_a_view_of_its_own(_uneven_batch()))
    with pytest.raises(UserError, match="compares inner layers, but the teacher's signal has none"):
        _gradient(_recipe(objective=INNER, with_teacher=False), _uneven_batch())


def test_evaluation_pays_nothing_for_inner_layers():
    """The same module with and without: neither taps nor their losses are left in it."""

    def module(objective):
        recipe = _recipe(objective=objective)
        state, frozen, _ = _start(recipe, placement(MeshConfig(data=1), jax.devices()[:1]))
        return jax.jit(partial(sums_of, recipe=recipe)).lower(state.params, frozen, _uneven_batch()).compile()

    plain, inner = module(OBJECTIVE), module(INNER)
    assert inner.memory_analysis().temp_size_in_bytes == plain.memory_analysis().temp_size_in_bytes
    assert inner.cost_analysis()["flops"] == plain.cost_analysis()["flops"]


def _following(place, follows, batches):
    """Return what each step of a student taught by itself logs, with the state before it, and the last state."""
    recipe = replace(
        _recipe(place, objective=replace(OBJECTIVE, alpha=0.0), teacher=STUDENT),
        teacher_follows=follows,
        average_decay=0.75,
    )
    state = init_state(recipe, _init(Model(STUDENT), 1))
    where = place.state_shardings(state, {"student": recipe.model.logical_axes()})
    frozen = {"teacher": jax.tree.map(np.asarray, _init(Model(STUDENT), 2))}
    do, state, seen = place.compile_step(partial(step, recipe=recipe), where), jax.device_put(state, where), []
    frozen = jax.device_put(frozen, place.state_shardings(frozen, {"teacher": recipe.model.logical_axes()}))
    for batch in batches:
        before = jax.tree.map(np.asarray, (state.params["student"], state.slow))
        state, metrics = do(state, frozen, place.put_batch(batch))
        seen.append((before, {name: float(value) for name, value in metrics.items()}))
    return seen, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 1},
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"placement": "pmap"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_teacher_is_the_moving_average_of_its_student(mesh):
    """Two batches: the average after each is by hand that of the parameters, and what taught is the one before."""
    devices = jax.devices()[:1] if mesh == {"data": 1} else None
    view = _uneven_batch(0)
    hard = replace(view, student=replace(view.student, tokens_BT=(view.student.tokens_BT + 1) % V))
    apart = replace(hard, teacher=view.student, teacher_rows_BR=view.student_rows_BR)  # another view, so it must move
    seen, state = _following(placement(MeshConfig(**mesh), devices), "average", [apart, apart, apart])
    slow = seen[0][0][0]
    for (_, average), (student, _) in zip(
        [one[0] for one in seen[1:]] + [(None, state.slow)],
        [one[0] for one in seen[1:]] + [(state.params["student"], None)],
        strict=True,
    ):
        slow = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, slow, student)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), average["student"], slow)
    (student, average), metrics = seen[2]
    recipe = _recipe(objective=replace(OBJECTIVE, alpha=0.0), teacher=STUDENT)
    trained = {"student": student, "projections": {}}
    plain = jax.jit(partial(loss_sums, recipe))(trained, {"teacher": average["student"]}, apart)[1]
    assert metrics["kd"] == pytest.approx(float(plain["kd"]) / apart.kd_weight_BR.sum(), rel=1e-4) and metrics["kd"] > 0


def test_a_student_taught_by_itself_of_today_has_nothing_to_learn_from_one_view():
    place = placement(MeshConfig(data=1), jax.devices()[:1])
    seen, state = _following(place, "student", [_uneven_batch(0)])
    assert abs(seen[0][1]["kd"]) < 1e-6 and seen[0][1]["grad_norm"] < 1e-5 and state.slow == {}
    frozen, _ = _following(place, "nothing", [_uneven_batch(0)])
    assert frozen[0][1]["kd"] > 0.01
