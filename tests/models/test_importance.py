"""Each score against its equation, over a forward pass written out in float64 numpy."""

import jax
import numpy as np
import pytest

from kdjax.models import Model, ModelConfig
from kdjax.models.importance import importance, statistics
from kdjax.shapes import View

CONFIG = ModelConfig(vocab_size=50, width=12, layers=3, heads=4, kv_heads=2, head_width=4, mlp_width=10)
CONFIG = ModelConfig(**vars(CONFIG) | {"unrotated": (0, 1, 2)})
EXPERTS = ModelConfig(**vars(CONFIG) | {"experts": 3, "layers": 1, "unrotated": (0,)})
STATISTICS = jax.jit(statistics, static_argnums=0)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 0, 0]])


def view(segment_BT, seed):
    tokens_BT = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, segment_BT.shape)
    position_BT = np.broadcast_to(np.arange(segment_BT.shape[1]), segment_BT.shape)
    return View(tokens_BT.astype(np.int32), segment_BT, position_BT)


def parameters(config):
    """Random parameters, spread so far that layers do something."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(Model(config).init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32) + (x.ndim < 3), shapes)


def rms(x, scale):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG.norm_eps) * scale


def attention(p, x_BTD, segment_BT):
    """Return the heads' outputs, [B, T, H, K]."""
    q, k, v = (np.einsum("btd,dhk->bthk", x_BTD, p[name]["kernel"]) for name in "qkv")
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    sees = (segment_BT[:, :, None] == segment_BT[:, None]) & np.tri(segment_BT.shape[1], dtype=bool)
    scores = np.where(sees[:, None], np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(CONFIG.head_width), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


def activations(params, seen):
    """Yield (where, what) of all that is measured, in order."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["embed"]["embedding"][seen.tokens_BT]
    for layer in range(len(p["layers"]["attention_norm"]["scale"])):
        own, before = jax.tree.map(lambda a, i=layer: a[i], p["layers"]), x
        normed = rms(x, own["attention_norm"]["scale"])
        y = attention(own["attention"], normed, seen.segment_BT)
        yield "head", np.linalg.norm(y, axis=-1)
        x = x + np.einsum("bthk,hkd->btd", y, own["attention"]["out"]["kernel"])
        second = rms(x, own["mlp_norm"]["scale"])
        yield "norm", np.abs(normed)
        yield "norm", np.abs(second)
        if "router" in own:
            scores = np.exp(second @ own["router"]["kernel"])
            yield "expert", scores / scores.sum(-1, keepdims=True)
            return
        gate = second @ own["mlp"]["gate"]["kernel"]
        inner = gate / (1 + np.exp(-gate)) * (second @ own["mlp"]["up"]["kernel"])
        yield "neuron", np.abs(inner)
        x = x + inner @ own["mlp"]["down"]["kernel"]
        yield "layer", 1 - (before * x).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(x, axis=-1)
    yield "norm", np.abs(rms(x, p["final_norm"]["scale"]))


def wanted(params, views):
    """Return what each place gave on all real tokens: [rows][tokens of a row, units]."""
    rows = {}
    for seen in views:
        for place, (kind, found) in enumerate(activations(params, seen)):
            of_place = rows.setdefault((kind, place), [])
            of_place += [row[is_real > 0] for row, is_real in zip(found, seen.segment_BT, strict=True)]
    return rows


def by_rows(rows):
    return np.sqrt(sum(np.square(row.mean(axis=0)) for row in rows))


def measured(config, params, views):
    return importance([STATISTICS(Model(config), params, seen) for seen in views])


def test_scores_are_those_of_their_equations():
    params, views = parameters(CONFIG), [view(SEGMENTS, 0), view(SEGMENTS[::-1], 1)]
    got, rows = measured(CONFIG, params, views), wanted(params, views)
    of = lambda kind: [found for (name, _), found in rows.items() if name == kind]  # noqa: E731
    np.testing.assert_allclose(got.layer_L, [np.concatenate(found).mean() for found in of("layer")], rtol=1e-4)
    np.testing.assert_allclose(got.head_LH, [by_rows(found) for found in of("head")], rtol=1e-4)
    np.testing.assert_allclose(got.neuron_LF, [by_rows(found) for found in of("neuron")], rtol=1e-4)
    assert len(of("norm")) == 7
    np.testing.assert_allclose(got.channel_D, sum(by_rows(found) for found in of("norm")), rtol=1e-4)
    assert got.expert_LE is None and np.all(got.layer_L > 0.01)


def test_the_share_of_experts_is_the_routers_mean_probability():
    params, seen = parameters(EXPERTS), view(SEGMENTS, 0)
    got, rows = measured(EXPERTS, params, [seen]), wanted(params, [seen])
    (share,) = (np.concatenate(found).mean(axis=0) for (kind, _), found in rows.items() if kind == "expert")
    np.testing.assert_allclose(got.expert_LE, [share], rtol=1e-4)
    assert got.neuron_LF is None and got.expert_LE.sum() == pytest.approx(1)


def test_padding_plays_no_part():
    params, first, second = parameters(CONFIG), view(SEGMENTS, 0), view(SEGMENTS, 1)
    is_real = SEGMENTS > 0
    other = View(np.where(is_real, first.tokens_BT, second.tokens_BT), SEGMENTS, first.position_BT)
    one, two = (measured(CONFIG, params, [seen]) for seen in (first, other))
    for name in ("layer_L", "head_LH", "neuron_LF", "channel_D"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-6)
