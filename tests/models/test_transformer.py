"""The Transformer as a pure function: shapes, who sees whom, dropout, taps, remat, cache, dtypes, tracing."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.models import TAPS, Model, ModelConfig, blocks, parameter_count, transformer
from kdjax.models.attention import attend
from kdjax.models.config import Rope
from kdjax.models.layers import dropout
from kdjax.shapes import View

LLAMA = ModelConfig(vocab_size=97, width=32, layers=3, heads=4, kv_heads=2, head_width=8, mlp_width=48)
UNTIED = replace(LLAMA, tie_head=False)
GPT2 = replace(
    LLAMA, family="gpt2", kv_heads=4, norm="layer", activation="gelu_tanh", gated_mlp=False, positions="learned",
    qkv_bias=True, out_bias=True, mlp_bias=True, max_positions=64, dropout=0.2,
)  # fmt: skip
GEMMA = replace(
    LLAMA, family="gemma3_text", norms="both", qk_norm="head", windows=(3, 0, 3), rope=Rope(1e3, "linear", 4.0),
    local_rope=Rope(1e2), attention_scale=0.3, attention_soft_cap=3.0, head_soft_cap=5.0, scale_embedding=True,
)  # fmt: skip
MOE = replace(
    LLAMA, family="mixtral", experts=4, parallel=True, qk_norm="heads", unrotated=(1,), rope=Rope(1e2, share=0.5)
)
"""With what else is rare."""
T5 = replace(
    LLAMA, family="t5", encoder_layers=2, positions="relative", relative_buckets=8, relative_distance=6,
    attention_scale=1.0, norm_eps=1e-6, head_scale=0.2, activation="relu", gated_mlp=False,
)  # fmt: skip
BIASED = [replace(LLAMA, positions=kind) for kind in ("alibi", "sinusoidal", "relative")]
ENCODER = replace(
    GPT2, family="bert", causal=False, norms="sum", embedding_norm=True, token_types=2, head_transform="gelu",
    head_norm=True, head_bias=True, dropout=0.0,
)  # fmt: skip
BY_NAME = {"llama": LLAMA, "gpt2": GPT2, "gemma": GEMMA, "moe": MOE}
CONFIGS = pytest.mark.parametrize("config", BY_NAME.values(), ids=BY_NAME)
ALL_CONFIGS = pytest.mark.parametrize("config", [*BY_NAME.values(), UNTIED], ids=[*BY_NAME, "untied"])


@partial(jax.jit, static_argnums=0, static_argnames="taps")
def run(model, params, view, **options):
    return model.apply(params, view, **options)


@cache
def params_of(config):
    """Random parameters, biases and scales too; drawn by numpy, which has nothing to compile."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(Model(config).init, jax.random.key(0))

    def draw(path, shape):
        return jnp.asarray((path[-1].key == "scale") + 0.06 * rng.normal(size=shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def plain_view(tokens_BT):
    tokens_BT = jnp.asarray(tokens_BT)
    position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    return View(tokens_BT, jnp.ones_like(tokens_BT), position_BT)


def some_tokens(batch, tokens, seed=0):
    return np.random.default_rng(seed).integers(0, 97, (batch, tokens)).astype(np.int32)


@ALL_CONFIGS
def test_parameters_are_the_agreed_tree(config):
    params = jax.eval_shape(Model(config).init, jax.random.key(0))
    shapes = {"/".join(k.key for k in path): x.shape for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert shapes["layers/attention/q/kernel"] == (3, 32, 4, 8)
    assert shapes["layers/attention/k/kernel"] == (3, 32, config.kv_heads, 8)
    assert shapes["layers/attention/out/kernel"] == (3, 4, 8, 32)
    if config.experts:
        assert shapes["layers/experts/down/kernel"] == (3, 4, 48, 32) and shapes["layers/router/kernel"] == (3, 32, 4)
    else:
        assert shapes["layers/mlp/down/kernel"] == (3, 48, 32)
    assert shapes["embed/embedding"] == (97, 32)
    assert ("head/kernel" in shapes) == (not config.tie_head)
    assert ("positions/embedding" in shapes) == (config.positions == "learned")
    assert ("layers/attention/q/bias" in shapes) == config.qkv_bias
    assert ("final_norm/bias" in shapes) == (config.norm == "layer")
    assert parameter_count(params) == sum(int(np.prod(shape)) for shape in shapes.values())


@ALL_CONFIGS
def test_every_parameter_has_axis_names(config):
    model = Model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    sizes = {"layers": 3, "embed": 32, "heads": 4, "kv_heads": config.kv_heads, "head_width": 8, "mlp": 48}
    sizes |= {"vocab": 97, "position": config.max_positions, "experts": 4, "expert_mlp": 48}

    def check(leaf, names):
        unnamed = (32, 8, config.heads, config.kv_heads, config.experts)  # of norms, and the router's picks
        assert all(size in ((sizes[name],) if name else unnamed) for name, size in zip(names, leaf.shape, strict=True))

    jax.tree.map(check, shapes, model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple))


def test_random_parameters_are_small_and_scales_one():
    params = jax.jit(Model(GPT2).init)(jax.random.key(0))
    kernel, bias = params["layers"]["attention"]["q"]["kernel"], params["layers"]["attention"]["q"]["bias"]
    assert abs(float(kernel.std()) - 0.02) < 0.001 and not bias.any()
    assert abs(float(params["layers"]["mlp"]["down"]["kernel"].std()) - 0.02 / 6**0.5) < 0.001
    assert not np.array_equal(kernel[0], kernel[1])
    assert (params["layers"]["mlp_norm"]["scale"] == 1).all()


@CONFIGS
def test_hidden_taps_and_head(config):
    model, params, view = Model(config), params_of(config), plain_view(some_tokens(2, 8))
    output = run(model, params, view, taps=TAPS)
    assert output.hidden_BTD.shape == (2, 8, 32)
    shapes = {name: tap.shape for name, tap in output.taps.items()}
    kv = (3, 2, 8, config.kv_heads, 8)
    assert shapes == {"hidden": (3, 2, 8, 32), "q": (3, 2, 8, 4, 8), "k": kv, "v": kv}
    assert run(model, params, view).taps == {}
    head = model.head(params)
    assert head.w_DV.shape == (32, 97) and head.vocab_size == 97
    last, params = np.asarray(output.taps["hidden"][-1]), jax.tree.map(np.asarray, params)
    centred = last - last.mean(-1, keepdims=True) if config.norm == "layer" else last
    normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + config.norm_eps)
    normed = normed * params["final_norm"]["scale"] + params["final_norm"].get("bias", 0)
    np.testing.assert_allclose(output.hidden_BTD, normed, atol=1e-5)


def test_an_unknown_tap_is_refused():
    with pytest.raises(UserError, match="no tap 'hiden'; did you mean 'hidden'"):
        Model(LLAMA).apply({}, plain_view(some_tokens(1, 2)), taps=("hiden",))


@CONFIGS
def test_packed_rows_equal_unpacked_ones(config):
    model, params = Model(config), params_of(config)
    tokens_BT = some_tokens(2, 8)
    first, second = run(model, params, plain_view(tokens_BT)).hidden_BTD
    packed = View(
        np.array([[*tokens_BT[0, :3], *tokens_BT[1, :5]], [*tokens_BT[1, :4], *tokens_BT[0, :2], 9, 9]]),
        np.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 0, 0]]),
        np.array([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 0, 0]]),
    )
    hidden = run(model, params, packed).hidden_BTD
    np.testing.assert_allclose(hidden[0], np.concatenate([first[:3], second[:5]]), atol=1e-5)
    np.testing.assert_allclose(hidden[1, :6], np.concatenate([second[:4], first[:2]]), atol=1e-5)


@CONFIGS
def test_padding_changes_no_real_row(config):
    model, params, tokens = Model(config), params_of(config), some_tokens(2, 8)
    segment = np.array([[1] * 6 + [0] * 2, [0] * 3 + [1] * 5])
    position = np.array([[*range(6), 0, 0], [0, 0, 0, *range(5)]])
    other = np.where(segment == 0, (tokens + 41) % 97, tokens)

    @jax.jit
    def grads_and_hidden(params, tokens):
        def loss(params):
            hidden = model.apply(params, View(tokens, segment, position)).hidden_BTD
            return (jnp.sin(hidden) * (segment > 0)[:, :, None]).sum(), hidden

        return jax.grad(loss, has_aux=True)(params)

    (grads, hidden), (other_grads, other_hidden) = grads_and_hidden(params, tokens), grads_and_hidden(params, other)
    assert np.isfinite(hidden).all()
    # Rows are sorted by expert: padding moves real ones to other places of a matmul, which some CPUs round otherwise.
    same = (
        partial(np.testing.assert_allclose, rtol=1e-6, atol=2e-6) if config.experts else np.testing.assert_array_equal
    )
    same(hidden[segment > 0], other_hidden[segment > 0])
    jax.tree.map(same, grads, other_grads)
    assert not np.array_equal(hidden[segment == 0], other_hidden[segment == 0])


@CONFIGS
def test_a_token_sees_only_earlier_ones(config):
    model, params, tokens = Model(config), params_of(config), some_tokens(2, 8)
    changed = tokens.copy()
    changed[0, 5] = (changed[0, 5] + 1) % 97
    before, after = (run(model, params, plain_view(t)).hidden_BTD for t in (tokens, changed))
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert (np.abs(before[0, 5:] - after[0, 5:]).max(-1) > 1e-6).all()


def test_remat_changes_no_gradient():
    params, view = params_of(LLAMA), plain_view(some_tokens(2, 8))

    def grads(remat):
        return jax.jit(jax.grad(lambda p: jnp.sin(Model(LLAMA, remat=remat).apply(p, view).hidden_BTD).sum()))(params)

    kept = grads("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), kept, grads(remat))


def test_remat_keeps_less():
    view = plain_view(some_tokens(2, 8))

    def kept(remat):
        def residuals(params):
            return jax.vjp(lambda p: Model(LLAMA, remat=remat).apply(p, view).hidden_BTD, params)[1]

        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(residuals, params_of(LLAMA))))

    assert kept("full") < kept("dots") < kept("none")


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_layer_is_traced_once_however_many_there_are(remat):
    def traces(layers):
        calls = []

        def counted(*args):
            calls.append(None)
            return attend(*args)

        model = Model(replace(LLAMA, layers=layers), remat=remat, attention=counted)
        params = jax.eval_shape(Model(model.config).init, jax.random.key(0))
        jax.eval_shape(model.apply, params, plain_view(some_tokens(1, 4)))
        return len(calls)

    assert traces(2) == traces(9) == 1


@CONFIGS
def test_bfloat16_is_close_and_keeps_float32_parameters(config):
    params, view, model = params_of(config), plain_view(some_tokens(2, 8)), Model(config, dtype="bfloat16")

    @jax.jit
    def grads_and_hidden(params):
        def loss(params):
            hidden = model.apply(params, view).hidden_BTD
            return hidden.astype(jnp.float32).sum(), hidden

        return jax.grad(loss, has_aux=True)(params)

    grads, hidden = grads_and_hidden(params)
    assert hidden.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))
    error = np.abs(hidden.astype(jnp.float32) - run(Model(config), params, view).hidden_BTD)
    assert 0 < error.max() < 0.1


def test_dropout_goes_by_row_key_layer_and_site():
    model, params = Model(GPT2), params_of(GPT2)
    view = plain_view(np.repeat(some_tokens(1, 8), 4, axis=0))
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(7), row))(jnp.arange(4))
    whole = run(model, params, view, row_keys_B=keys).hidden_BTD
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    for row in (0, 3):
        alone = run(model, params, jax.tree.map(lambda x: x[:1], view), row_keys_B=keys[row : row + 1]).hidden_BTD
        np.testing.assert_allclose(alone[0], whole[row], atol=1e-5)
    undropped = run(model, params, view).hidden_BTD
    np.testing.assert_array_equal(undropped[0], undropped[3])


def test_every_site_of_every_layer_drops_by_its_own_number(monkeypatch):
    sites = []

    def noted(x_BTD, row_keys_B, site, rate):
        jax.debug.callback(lambda number: sites.append(int(number)), site)
        return dropout(x_BTD, row_keys_B, site, rate)

    for module in (transformer, blocks):
        monkeypatch.setattr(module, "dropout", noted)
    keys = jax.random.split(jax.random.key(0), 2)
    Model(GPT2).apply(params_of(GPT2), plain_view(some_tokens(2, 8)), row_keys_B=keys).hidden_BTD.block_until_ready()
    jax.effects_barrier()
    assert len(sites) == len(set(sites)) == 1 + 2 * GPT2.layers


def test_dropout_masks_differ_between_sites_and_keep_the_mean():
    keys, ones = jax.random.split(jax.random.key(0), 64), jnp.ones((64, 20, 30))
    drops = [np.asarray(dropout(ones, keys, site, 0.25)) for site in range(3)]
    for drop in drops:
        assert set(np.unique(drop)) == {0.0, np.float32(1 / 0.75)} and abs(drop.mean() - 1) < 0.02
    assert not np.array_equal(drops[0], drops[1]) and not np.array_equal(drops[1], drops[2])
    assert dropout(ones, None, 0, 0.25) is ones and dropout(ones, keys, 0, 0.0) is ones


@CONFIGS
def test_cached_calls_equal_one_whole_call(config):
    model, params, tokens = Model(config), params_of(config), some_tokens(2, 8)
    whole = run(model, params, plain_view(tokens)).hidden_BTD
    cache, parts, view = model.empty_cache(2, 12), [], plain_view(tokens)
    for start, stop in ((0, 6), (6, 7), (7, 8)):
        part = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], view)
        output = run(model, params, part, cache=cache)
        cache, parts = output.cache, [*parts, output.hidden_BTD]
    assert int(cache.used) == 8 and cache.own[0].shape == (3, 2, 12, config.kv_heads, 8)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("config", BIASED, ids=lambda config: config.positions)
def test_positions_count_within_a_text_and_in_the_cache(config):
    model, params, tokens = Model(config), params_of(config), some_tokens(1, 8)
    alone = run(model, params, plain_view(tokens)).hidden_BTD
    other = some_tokens(1, 5, seed=1)
    packed = View(np.concatenate([other, tokens], 1), np.array([[1] * 5 + [2] * 8]), np.array([[*range(5), *range(8)]]))
    np.testing.assert_allclose(run(model, params, packed).hidden_BTD[:, 5:], alone, atol=1e-5)
    swapped = tokens[:, [1, 0, *range(2, 8)]]
    assert np.abs(run(model, params, plain_view(swapped)).hidden_BTD[:, -1] - alone[:, -1]).max() > 1e-4
    first = jax.tree.map(lambda x: x[:, :5], plain_view(tokens))
    output = run(model, params, first, cache=model.empty_cache(1, 9))
    rest = run(model, params, jax.tree.map(lambda x: x[:, 5:], plain_view(tokens)), cache=output.cache)
    np.testing.assert_allclose(rest.hidden_BTD, alone[:, 5:], atol=1e-5)


def test_a_decoder_reads_its_encoder_once():
    model, params, tokens = Model(T5), params_of(T5), some_tokens(2, 8)
    view = replace(plain_view(tokens), encoder=plain_view(some_tokens(2, 11, seed=1)))
    whole = run(model, params, view).hidden_BTD
    first = replace(jax.tree.map(lambda x: x[:, :5], plain_view(tokens)), encoder=view.encoder)
    output = run(model, params, first, cache=model.empty_cache(2, 9))
    assert output.cache.encoder[0].shape == (3, 2, 11, 2, 8)
    rest = run(model, params, jax.tree.map(lambda x: x[:, 5:], plain_view(tokens)), cache=output.cache)
    np.testing.assert_allclose(np.concatenate([output.hidden_BTD, rest.hidden_BTD], 1), whole, atol=1e-5)
    other = replace(view, encoder=plain_view(some_tokens(2, 11, seed=2)))
    assert np.abs(run(model, params, other).hidden_BTD - whole).max() > 1e-3
    with pytest.raises(UserError, match="wants a view with an encoder's"):
        run(model, params, plain_view(tokens))


def test_an_encoder_sees_what_follows_and_knows_token_types():
    model, params, tokens = Model(ENCODER), params_of(ENCODER), some_tokens(1, 6)
    before = run(model, params, plain_view(tokens)).hidden_BTD
    later = tokens.copy()
    later[0, -1] = (later[0, -1] + 1) % 97
    assert np.abs(run(model, params, plain_view(later)).hidden_BTD[:, 0] - before[:, 0]).max() > 1e-4
    first = replace(plain_view(tokens), type_BT=np.zeros_like(tokens))
    second = replace(plain_view(tokens), type_BT=np.ones_like(tokens))
    np.testing.assert_array_equal(run(model, params, first).hidden_BTD, before)
    assert np.abs(run(model, params, second).hidden_BTD - before).max() > 1e-4


def test_another_attention_kernel_takes_the_place():
    def only_self(q_BTHK, k_BSGK, v_BSGK, sight):
        assert sight.mask_B1TS.shape == (2, 1, 8, 8) and sight.query_segment_BT.shape == (2, 8)
        return jnp.repeat(v_BSGK, q_BTHK.shape[2] // v_BSGK.shape[2], axis=2)

    model, params, tokens = Model(LLAMA, attention=only_self), params_of(LLAMA), some_tokens(2, 8)
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    before, after = (run(model, params, plain_view(t)).hidden_BTD for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])


def test_models_are_hashable_and_equal_by_value():
    assert Model(LLAMA) == Model(replace(LLAMA)) and hash(Model(LLAMA)) == hash(Model(replace(LLAMA)))
    assert Model(LLAMA) != Model(LLAMA, dtype="bfloat16")
