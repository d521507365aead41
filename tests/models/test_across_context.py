"""Models whose rows lie on several devices: hidden states and gradients are those of one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gist import packed, with_gist
from test_transformer import BIASED, ENCODER, GEMMA, GPT2, LLAMA, MOE, T5, params_of

from kdjax.models import Model, attend, prefix_of
from kdjax.models.config import Rope
from kdjax.shapes import View
from kdjax.sharding import MeshConfig, placement

DYNAMIC = replace(LLAMA, rope=Rope(100.0, "dynamic", 4.0, 10))
CONFIGS = {
    "llama": LLAMA, "gemma": GEMMA, "gpt2": replace(GPT2, dropout=0.0), "moe": MOE, "t5": T5, "encoder": ENCODER,
    "dynamic": DYNAMIC, **{config.positions: config for config in BIASED},
}  # fmt: skip
CASES = [*((name, "plain") for name in CONFIGS), ("gemma", "prefix"), ("llama", "gist")]
MESHES = {"context 2, tensor 2": {"data": 2, "context": 2, "tensor": 2}, "context 4": {"data": 2, "context": 4}}
EACH = [*((*case, "context 2, tensor 2") for case in CASES), ("llama", "plain", "context 4")]
"""What is run: each kind on one mesh, since each compiles anew, and keys that are repeated more often on another."""


def view_of(config, kind):
    """Packed rows of 32 tokens, some of them padding, of a second one with an encoder's."""
    if kind == "gist":
        return packed()[0]
    rng = np.random.default_rng(4)
    lengths = np.array([[13, 9], [20, 12]])
    starts = np.cumsum(np.pad(lengths, ((0, 0), (1, 0))), axis=1)
    at = np.arange(32)[None, :, None]
    segment = ((at >= starts[:, None, :2]) & (at < starts[:, None, 1:])) @ np.array([1, 2])
    position = np.where(segment > 0, at[..., 0] - np.take_along_axis(starts, np.maximum(segment - 1, 0), axis=1), 0)
    view = View(jnp.asarray(rng.integers(0, 97, (2, 32))), jnp.asarray(segment), jnp.asarray(position))
    return replace(view, encoder=replace(view, tokens_BT=97 - 1 - view.tokens_BT)) if config.encoder_layers else view


def outcome(model, params, view, prefix):
    """Return hidden states of real tokens, and the gradient of a function of them in all parameters."""
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(*view.tokens_BT.shape, 32)), jnp.float32)

    def loss(params):
        hidden = jnp.where(view.segment_BT[:, :, None] > 0, model.apply(params, view, prefix=prefix).hidden_BTD, 0)
        return jnp.sum(jnp.sin(hidden) * weight), hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return jax.tree.map(np.asarray, {"hidden": hidden, "gradients": gradients})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "mesh"), EACH)
def test_tokens_of_a_row_may_lie_on_several_devices(name, kind, mesh):
    config, place = CONFIGS[name], placement(MeshConfig(**MESHES[mesh]))
    params = with_gist(config) if kind == "gist" else params_of(config)
    alone = Model(config)
    spread = replace(alone, attention=place.attention(attend), layout=place.constrain, dispatch=place.dispatch)
    prefix = prefix_of(alone, params, [3, 1, 4, 1, 5]) if kind == "prefix" else None
    got, want = (outcome(model, params, view_of(config, kind), prefix) for model in (spread, alone))
    total = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(want["gradients"])))
    for (path, exact), ours in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        error = np.linalg.norm(ours - exact)
        assert error <= max(1e-5 * np.linalg.norm(exact), 1e-6 * total), jax.tree_util.keystr(path)
