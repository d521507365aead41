"""Each score against its equation, over a forward pass written out in float64 numpy."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from kdjax.models import Model, ModelConfig
from kdjax.models.importance import importance, statistics
from kdjax.shapes import View

CONFIG = ModelConfig(vocab_size=50, width=12, layers=3, heads=4, kv_heads=2, head_width=4, mlp_width=10)
CONFIG = ModelConfig(**vars(CONFIG) | {"unrotated": (0, 1, 2)})
EXPERTS = ModelConfig(**vars(CONFIG) | {"experts": 3, "layers": 1, "unrotated": (0,)})
ENCODER = ModelConfig(
    vocab_size=50, width=12, layers=3, heads=4, kv_heads=4, head_width=4, mlp_width=10, norm="layer", norms="sum",
    embedding_norm=True, causal=False, activation="relu", gated_mlp=False, positions="learned",
)  # fmt: skip
BOTH = ModelConfig(
    vocab_size=50, width=12, layers=2, encoder_layers=3, heads=4, kv_heads=4, head_width=4, mlp_width=10,
    activation="relu", gated_mlp=False, positions="relative", attention_scale=1.0,
)  # fmt: skip
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


def plain_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return rms(x, p["scale"]) + p["bias"]


def attended(p, x_BTD, y_BSD, sees_BTS, scale):
    """Return what heads that read x say of y, [B, T, H, K]."""
    q, k, v = (
        np.einsum("btd,dhk->bthk", a, p[name]["kernel"]) for name, a in zip("qkv", (x_BTD, y_BSD, y_BSD), strict=True)
    )
    scores = np.where(sees_BTS[:, None], np.einsum("bthk,bshk->bhts", q, k) * scale, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.nan_to_num(np.exp(scores - scores.max(-1, keepdims=True)))
    return np.einsum("bhts,bshk->bthk", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30), v)


def stack(config, p, x_BTD, segment_BT, causal, other=None):
    """Return what a stack of layers makes of x, and (what, activations) of all that is measured in it."""
    found, scale, is_sum = [], config.attention_scale or config.head_width**-0.5, config.norms == "sum"

    def sees(others_BS):
        return segment_BT[:, :, None] == others_BS[:, None]

    def branch(own, name, x, f):
        if is_sum:
            x = plain_norm(x + f(x), own[f"{name}_sum_norm"])
            found.append(("norm", np.abs(x)))
            return x
        normed = rms(x, own[f"{name}_norm"]["scale"])
        found.append(("norm", np.abs(normed)))
        return x + f(normed)

    def attention(own, kind, y=None, sees_BTS=None):
        def f(x):
            said = attended(own, x, x if y is None else y, sees_BTS, scale)
            found.append((kind, np.linalg.norm(said, axis=-1)))
            return np.einsum("bthk,hkd->btd", said, own["out"]["kernel"])

        return f

    def mlp(own):
        def f(x):
            inner = np.maximum(x @ own["up"]["kernel"], 0)
            found.append(("neuron", np.abs(inner)))
            return inner @ own["down"]["kernel"]

        return f

    for layer in range(len(p["layers"]["mlp"]["up"]["kernel"])):
        own, first = jax.tree.map(lambda a, i=layer: a[i], p["layers"]), x_BTD
        mask = sees(segment_BT) & (np.tri(segment_BT.shape[1], dtype=bool) | (not causal))
        x_BTD = branch(own, "attention", x_BTD, attention(own["attention"], "head", None, mask))
        if other is not None:
            x_BTD = branch(own, "cross", x_BTD, attention(own["cross"], "cross", other[0], sees(other[1])))
        x_BTD = branch(own, "mlp", x_BTD, mlp(own["mlp"]))
        norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(x_BTD, axis=-1)
        found.append(("layer", 1 - (first * x_BTD).sum(-1) / norms))
    if not is_sum:
        x_BTD = rms(x_BTD, p["final_norm"]["scale"])
        found.append(("norm", np.abs(x_BTD)))
    return x_BTD, found


def check(got, found, segment_BT, names):
    """Compare a stack's scores with what was found in it; return those of its norms."""
    of = lambda kind: [  # noqa: E731
        [row[real] for row, real in zip(value, segment_BT > 0, strict=True)] for name, value in found if name == kind
    ]
    layer, head, neuron = (getattr(got, name) for name in names)
    heads = [by_rows(rows) for rows in of("head")]
    heads = [own + by_rows(rows) for own, rows in zip(heads, of("cross"), strict=True)] if of("cross") else heads
    np.testing.assert_allclose(layer, [np.concatenate(rows).mean() for rows in of("layer")], rtol=1e-4)
    np.testing.assert_allclose(head, heads, rtol=1e-4)
    np.testing.assert_allclose(neuron, [by_rows(rows) for rows in of("neuron")], rtol=1e-4)
    return sum(by_rows(rows) for rows in of("norm"))


DECODER_SCORES = ("layer_L", "head_LH", "neuron_LF")
ENCODER_SCORES = ("encoder_layer_M", "encoder_head_MH", "encoder_neuron_MF")


def test_scores_where_sums_are_normalised():
    params, seen = parameters(ENCODER), view(SEGMENTS, 0)
    got, p = measured(ENCODER, params, [seen]), jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    embedded = p["embed"]["embedding"][seen.tokens_BT] + p["positions"]["embedding"][seen.position_BT]
    embedded = plain_norm(embedded, p["embed_norm"])
    _, found = stack(ENCODER, p, embedded, SEGMENTS, causal=False)
    channels = check(got, [*found, ("norm", np.abs(embedded))], SEGMENTS, DECODER_SCORES)
    np.testing.assert_allclose(got.channel_D, channels, rtol=1e-4)
    assert got.encoder_layer_M is None and got.expert_LE is None


def test_scores_of_both_stacks():
    params, (read, said) = parameters(BOTH), (view(SEGMENTS, 0), view(SEGMENTS[:, :5], 1))
    for tree in (params, params["encoder"]):
        tree["relative"]["embedding"][:] = 0
    got = measured(BOTH, params, [replace(said, encoder=read)])
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    embed = lambda seen: p["embed"]["embedding"][seen.tokens_BT]  # noqa: E731
    encoded, of_encoder = stack(BOTH, p["encoder"], embed(read), read.segment_BT, causal=False)
    _, of_decoder = stack(BOTH, p, embed(said), said.segment_BT, True, (encoded, read.segment_BT))
    channels = check(got, of_encoder, read.segment_BT, ENCODER_SCORES)
    channels = channels + check(got, of_decoder, said.segment_BT, DECODER_SCORES)
    np.testing.assert_allclose(got.channel_D, channels, rtol=1e-4)


def test_a_norm_that_nobody_reads_plays_no_part():
    params, seen = parameters(CONFIG), view(SEGMENTS, 0)
    unread = replace(CONFIG, unnormed=(0,))
    other = jax.tree.map(np.copy, params)
    other["layers"]["attention_norm"]["scale"][0] *= 3
    scores = [measured(unread, tree, [seen]).channel_D for tree in (params, other)]
    np.testing.assert_allclose(*scores, rtol=1e-6)
    assert not np.allclose(scores[0], measured(CONFIG, params, [seen]).channel_D, rtol=1e-2)


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
