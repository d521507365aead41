"""What the compiled modules of a step send between devices: read from their text, nothing is run."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import pytest
from module_text import loops, sent
from test_step import OBJECTIVE, STUDENT, TEACHER, B, T, V, _init, _recipe, _uneven_batch

from kdjax.models import Model
from kdjax.sharding import MeshConfig, placement
from kdjax.step import init_state, step

pytestmark = pytest.mark.slow

LAYERS = 3
MODEL = replace(STUDENT, layers=LAYERS)


def module(mesh, microbatches=1, model=MODEL, with_teacher=True):
    """Return the text of a compiled step on a mesh, and the student's parameters."""
    place = placement(MeshConfig(**mesh))
    teacher = replace(TEACHER, heads=4, kv_heads=2, head_width=6)
    recipe = _recipe(place, microbatches, student=model, teacher=teacher, with_teacher=with_teacher)
    state, frozen = init_state(recipe, _init(Model(model), 1)), {"teacher": _init(Model(teacher), 2)}
    where = place.state_shardings(state, {"student": recipe.model.logical_axes()})
    of_frozen = place.state_shardings(frozen, {"teacher": Model(teacher).logical_axes()})
    do = place.compile_step(partial(step, recipe=recipe), where)
    state, frozen = jax.device_put(state, where), jax.device_put(frozen, of_frozen)
    compiled = do.lower(state, frozen, place.put_batch(_uneven_batch())).compile()
    return compiled.as_text(), state.params["student"]


def test_fsdp_gathers_parameters_layer_by_layer():
    """No device ever holds all layers of a kernel: what is gathered is one layer's, or the embedding or head."""
    text, params = module({"data": 1, "fsdp": 8})
    stacked = {x.shape for x in jax.tree.leaves(params["layers"]) if len(x.shape) > 2}
    assert stacked and all(shape[0] == LAYERS for shape in stacked)
    held = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert not stacked & held
    gathered = {shape for kind, _, shape in sent(text) if kind == "all-gather"}
    assert {shape[1:] for shape in stacked} <= gathered, "each kernel, a layer at a time"
    assert all(T not in shape and OBJECTIVE.chunk_tokens not in shape[:-1] for shape in gathered if V in shape)


def test_tensor_parallelism_gathers_no_logits():
    """What is as wide as the vocabulary stays where it lies, and of tokens only figures cross in the loss."""
    text, _ = module({"data": 4, "tensor": 2})
    assert f"[{OBJECTIVE.chunk_tokens},{V // 2}]" in text, "a device's part of a chunk's logits"
    assert f"[{OBJECTIVE.chunk_tokens},{V}]" not in text
    assert not [shape for kind, _, shape in sent(text) if kind != "all-reduce" and {V, V // 2} & set(shape)]
    loss = [body for body in loops(text) if f"[{OBJECTIVE.chunk_tokens},{V // 2}]" in body]
    shapes = {shape for body in loss for _, _, shape in sent(body)}
    assert shapes and shapes <= {(), (OBJECTIVE.chunk_tokens,)}


def test_data_parallelism_reduces_each_gradient_once():
    """As many numbers are added up over devices as the student has parameters, a layer's as often as there are layers.

    Its head is its own: a tied matrix has two gradients, as embedding and as head, each summed before they meet.
    """
    text, params = module({"data": 8}, model=replace(MODEL, tie_head=False), with_teacher=False)
    assert {kind for kind, _, _ in sent(text)} == {"all-reduce"}
    of_layer = max((sent(body) for body in loops(text)), key=len)
    numbers = [math.prod(shape) for _, _, shape in sent(text) + of_layer * (LAYERS - 1) if shape]
    assert of_layer and sum(numbers) == sum(x.size for x in jax.tree.leaves(params))


def test_pmap_reduces_each_gradient_once_whatever_the_microbatches():
    text, params = module({"placement": "pmap"}, microbatches=2, with_teacher=False)
    assert not [shape for body in loops(text) for _, _, shape in sent(body)], "not in the loop of microbatches"
    assert sum(math.prod(shape) for _, _, shape in sent(text) if shape) == sum(x.size for x in jax.tree.leaves(params))


def test_context_exchanges_heads_and_gathers_no_rows():
    """Queries, keys and values go all to all, in the loops of layers; nothing that a model computes is gathered."""
    text, _ = module({"data": 4, "context": 2})
    gathered = [(dtype, shape) for kind, dtype, shape in sent(text) if kind == "all-gather"]
    assert not [shape for dtype, shape in gathered if dtype != "s32"], "indices of rows alone"
    exchanging = [body for body in loops(text) if " all-to-all(" in body]
    assert exchanging
    for body in exchanging:
        assert {kind for kind, _, shape in sent(body) if {T, T // 2} & set(shape)} == {"all-to-all"}
    scores = f"[{B // 4},{{groups}},2,{T},{T}]"
    assert scores.format(groups=1) in text and scores.format(groups=2) not in text, "those of half of the heads"
