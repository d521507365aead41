"""Our FLOPs beside those that XLA counts in a step without loops, and beside counting by hand."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import pytest

from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelConfig, ModelSpec, transformer
from kdjax.models.config import Lora
from kdjax.plan.abstract import abstract_batch, abstract_frozen, abstract_job
from kdjax.plan.flops import forward, seen_pairs, step_flops, trained_share

SMALL = ModelConfig(vocab_size=512, width=128, layers=2, heads=4, kv_heads=2, head_width=32, mlp_width=256)
LARGER = replace(SMALL, width=192, layers=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "remat", "alpha"),
    [
        ({}, "none", 0.1),
        ({}, "full", 0.1),
        ({}, "none", 1.0),
        ({"gated_mlp": False, "kv_heads": 4, "tie_head": False}, "none", 0.1),
    ],
)
def test_they_are_those_of_a_step_without_loops(monkeypatch, change, remat, alpha):
    """XLA counts a few per cent more: norms, softmax, rotary angles, the divergence and the optimiser."""
    monkeypatch.setattr(transformer.nn, "scan", partial(nn.scan, unroll=True))
    student, teacher = replace(SMALL, **change), replace(LARGER, **change)
    config = Config(
        student=ModelSpec(architecture=student, remat=remat),
        teacher=ModelSpec(architecture=teacher),
        data=DataConfig(sequence_length=64),
        objective=ObjectiveConfig(alpha=alpha, chunk_tokens=10_000),
        batch_size=2,
    )
    job = abstract_job(config, jax.devices()[:1])
    compiled = job.step.lower(job.abstract_state, abstract_frozen(job), abstract_batch(job)).compile()
    counted = compiled.cost_analysis()["flops"]
    ours = step_flops(config, student, teacher).done
    assert 0.94 * counted < ours < counted


def test_a_forward_pass_is_what_one_counts_by_hand():
    found = forward(SMALL, rows=3, tokens=10)
    layer = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 256  # q; k, v; out; gate, up, down
    assert found.weights == 2 * 30 * 2 * layer
    assert found.attention == 2 * 3 * 2 * (2 * 4 * 32 * 10 * 10)  # layers, rows; scores and values
    assert found.seen == found.attention * 55 / 100


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 10, 40])
def test_pairs_that_see_each_other_are_those_of_the_mask(window, causal):
    tokens, reach = 10, window or 10**6
    config = replace(SMALL, layers=1, windows=(window,) if window else (), causal=causal)
    pairs = [(i, j) for i in range(tokens) for j in range(tokens) if abs(i - j) < reach and (j <= i or not causal)]
    assert seen_pairs(config, tokens) == len(pairs)


def test_experts_count_where_they_are_picked():
    dense, mixed = forward(SMALL, 1, 8), forward(replace(SMALL, experts=8, experts_per_token=2), 1, 8)
    assert mixed.weights - dense.weights == 2 * 8 * 2 * (3 * 128 * 256 + 128 * 8)  # a second mlp, the router


def test_an_encoder_decoder_is_both_stacks_and_the_attention_between():
    both = replace(SMALL, encoder_layers=2)
    alone, whole = forward(SMALL, 1, 8), forward(both, 1, 8, 8)
    cross = 2 * 2 * 8 * (2 * 128 * 128 + 2 * 128 * 64)
    assert whole.weights == 2 * alone.weights + cross


def test_frozen_weights_take_no_gradient():
    config = Config(student=ModelSpec(architecture=SMALL), data=DataConfig(sequence_length=8))
    whole = step_flops(config, SMALL)
    adapted = step_flops(replace(config, student=ModelSpec(architecture=SMALL, lora=Lora(rank=2))), SMALL)
    assert whole.student - adapted.student == forward(SMALL, 8, 8).weights
    assert trained_share(ModelSpec(lora=Lora(rank=2), trained=("final_norm",))) == 1.0


def test_the_loss_is_the_floor_of_its_matmuls():
    config = Config(teacher=ModelSpec(), data=DataConfig(sequence_length=8), batch_size=4)
    found = step_flops(config, SMALL, LARGER)
    assert found.loss == 2 * 32 * 512 * (128 + 192) + 4 * 32 * 512 * 128
    assert found.done == found.teacher + found.student + found.loss
