"""The one decoder Transformer of every family, and `Model`: its pure face over plain nested dicts of arrays.

Layers are stacked on a leading axis and run under `nn.scan`; what differs between families is in `ModelConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.errors import UserError, did_you_mean
from kdjax.models.attention import Attention, Cache, Sight, attend, see
from kdjax.models.config import DType, ModelConfig, Remat
from kdjax.models.experts import Dispatch, Experts, here
from kdjax.models.layers import Embedding, Layout, Linear, Mlp, Norm, anywhere, branch_std, dropout
from kdjax.models.positions import rope_waves, rotate
from kdjax.shapes import Array, Head, Output, View

TAPS = ("hidden", "q", "k", "v")
"""What `Model.apply` can tap in each layer: its output, and the queries, keys and values that attention sees."""

STATISTICS = "statistics"
"""The collection that what is measured inside a call is put into (`kdjax.models.importance`), stacked by layer."""

_ALL = 2**30
"""A window that no text is as long as."""

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared:
    """What all layers of one call read."""

    sight: Sight
    waves: tuple[Array, Array] | None
    local_waves: tuple[Array, Array] | None
    """Of layers with a window, where these differ."""
    first_slot: Array | int
    row_keys_B: Array | None
    is_real_BT: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Own:
    """What a layer has of its own besides its parameters; None where all layers are alike. Stacked for the scan."""

    number: Array
    window: Array | None
    is_rotated: Array | None


class SelfAttention(nn.Module):
    """Grouped-query attention of a layer."""

    config: ModelConfig
    dtype: Any
    attention: Attention
    layout: Layout

    @nn.compact
    def __call__(
        self, x_BTD: Array, own: Own, shared: Shared, slots: tuple[Array, Array] | None
    ) -> tuple[Array, dict, Any]:
        """Return the output, its queries, keys and values by name, and the cache's slots with these tokens added."""
        c, width = self.config, (("embed", self.config.width),)
        heads = (("heads", c.heads), ("head_width", c.head_width))
        kv_heads = (("kv_heads", c.kv_heads), ("head_width", c.head_width))
        seen = {
            name: Linear(width, dims, c.qkv_bias, self.dtype, name=name)(x_BTD)
            for name, dims in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        }
        if c.qk_norm != "none":
            over = 1 if c.qk_norm == "head" else 2
            seen |= {name: Norm(c, self.dtype, over, name=f"{name}_norm")(seen[name]) for name in ("q", "k")}
        waves, window = shared.waves, own.window
        if window is not None and shared.local_waves is not None:
            waves = jax.tree.map(partial(jnp.where, window > 0), shared.local_waves, waves)
        if own.is_rotated is not None and waves is not None:
            still = jnp.ones_like(waves[0]), jnp.zeros_like(waves[1])
            waves = jax.tree.map(partial(jnp.where, own.is_rotated), waves, still)
        if waves is not None:
            seen |= {name: rotate(seen[name], waves) for name in ("q", "k")}
        q_BTHK = self.layout(seen["q"], ("batch", "sequence", "heads", None))
        k_BSGK = self.layout(seen["k"], ("batch", "sequence", "kv_heads", None))
        v_BSGK = self.layout(seen["v"], ("batch", "sequence", "kv_heads", None))
        if slots is not None:
            k_BSGK, v_BSGK = slots = tuple(
                _write(old, new, shared.first_slot) for old, new in zip(slots, (k_BSGK, v_BSGK), strict=True)
            )
        sight = shared.sight if window is None else shared.sight.within(jnp.where(window > 0, window, _ALL))
        y_BTHK = self.attention(q_BTHK, k_BSGK, v_BSGK, sight)
        y_BTHK = self.layout(y_BTHK, ("batch", "sequence", "heads", None))
        return Linear(heads, width, c.out_bias, self.dtype, branch_std(c), name="out")(y_BTHK), seen, slots


class Layer(nn.Module):
    """One layer: attention and mlp, each a residual branch."""

    config: ModelConfig
    dtype: Any
    attention: Attention
    layout: Layout
    dispatch: Dispatch
    taps: tuple[str, ...]

    @nn.compact
    def __call__(self, x_BTD: Array, own: Own, slots: tuple[Array, Array] | None, shared: Shared) -> tuple:
        """Return the carry of the scan (the residual stream), and this layer's taps, cache slots and further sums."""
        c, keys = self.config, shared.row_keys_B
        attention = SelfAttention(c, self.dtype, self.attention, self.layout, name="attention")
        h_BTD, seen, slots = attention(self._before("attention", x_BTD), own, shared, slots)
        first_BTD = x_BTD
        x_BTD = x_BTD + dropout(self._after("attention", h_BTD), keys, 1 + 2 * own.number, c.dropout)
        h_BTD, aux = self._mlp(self._before("mlp", first_BTD if c.parallel else x_BTD), shared)
        x_BTD = x_BTD + dropout(self._after("mlp", h_BTD), keys, 2 + 2 * own.number, c.dropout)
        x_BTD = self.layout(x_BTD, ("batch", "sequence", None))
        seen["hidden"] = x_BTD
        return x_BTD, ({name: seen[name] for name in self.taps}, slots, aux)

    def _mlp(self, x_BTD: Array, shared: Shared) -> tuple[Array, dict[str, Array]]:
        c = self.config
        if not c.experts:
            return Mlp(c, self.dtype, self.layout, name="mlp")(x_BTD), {}
        scores_BTE = Linear((("embed", c.width),), ((None, c.experts),), False, self.dtype, name="router")(x_BTD)
        return Experts(c, self.dtype, self.dispatch, name="experts")(x_BTD, scores_BTE, shared.is_real_BT)

    def _before(self, branch: str, x_BTD: Array) -> Array:
        is_there = self.config.norms in ("before", "both")
        return Norm(self.config, self.dtype, name=f"{branch}_norm")(x_BTD) if is_there else x_BTD

    def _after(self, branch: str, h_BTD: Array) -> Array:
        is_there = self.config.norms in ("after", "both")
        return Norm(self.config, self.dtype, name=f"{branch}_after_norm")(h_BTD) if is_there else h_BTD


class Transformer(nn.Module):
    """Embedding, the scanned layers, the last norm; the head's kernel is declared here and applied by the loss."""

    config: ModelConfig
    dtype: Any
    remat: Remat
    attention: Attention
    layout: Layout
    dispatch: Dispatch
    taps: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, view: View, cache: Cache | None = None, row_keys_B: Array | None = None) -> Output:
        """Return hidden states after the last norm, taps stacked by layer, and the cache with these tokens added."""
        c = self.config
        x_BTD = Embedding("vocab", c.vocab_size, c.width, self.dtype, self.layout, name="embed")(view.tokens_BT)
        if c.scale_embedding:
            x_BTD = x_BTD * jnp.asarray(c.width**0.5, self.dtype)
        if c.positions == "learned":
            table = Embedding("position", c.max_positions, c.width, self.dtype, self.layout, name="positions")
            x_BTD = x_BTD + table(view.position_BT)
        x_BTD = self.layout(dropout(x_BTD, row_keys_B, 0, c.dropout), ("batch", "sequence", None))

        first_slot, segment_BS, slots = 0, view.segment_BT, None
        if cache is not None:
            first_slot, slots = cache.used, (cache.k_LBSGK, cache.v_LBSGK)
            segment_BS = _write(cache.segment_BS, view.segment_BT, first_slot)
        sight = see(view.segment_BT, segment_BS, first_slot)
        sight = replace(sight, scale=c.attention_scale, soft_cap=c.attention_soft_cap)
        waves, local_waves = (
            rope_waves(view.position_BT, view.segment_BT, c.head_width, rope) if rope is not None else None
            for rope in (c.rope if c.positions == "rope" else None, c.local_rope if c.windows else None)
        )
        layers = self._layers()(c, self.dtype, self.attention, self.layout, self.dispatch, self.taps, name="layers")
        is_rotated_L = jnp.array([n not in c.unrotated for n in range(c.layers)]) if c.unrotated else None
        own = Own(jnp.arange(c.layers), jnp.array(c.windows) if c.windows else None, is_rotated_L)
        shared = Shared(sight, waves, local_waves, first_slot, row_keys_B, view.segment_BT > 0)
        x_BTD, (taps, slots, aux) = layers(x_BTD, own, slots, shared)

        if not c.tie_head and self.is_initializing():
            Linear((("embed", c.width),), (("vocab", c.vocab_size),), False, self.dtype, name="head")(x_BTD)
        if cache is not None:
            cache = Cache(slots[0], slots[1], segment_BS, cache.used + view.tokens_BT.shape[1])
        aux = jax.tree.map(partial(jnp.mean, axis=0), aux)
        return Output(Norm(c, self.dtype, name="final_norm")(x_BTD), taps, aux, cache)

    def _layers(self) -> Any:
        layer: Any = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scan: Any = nn.scan
        return scan(
            layer,
            variable_axes={"params": 0, STATISTICS: 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=self.config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # one trace of the layer, not two
        )


def _write(old_BS: Array, new_BT: Array, first_slot: Array | int) -> Array:
    """Return the slots (of segments, keys or values) with the new tokens written from `first_slot` on."""
    return jax.lax.dynamic_update_slice_in_dim(old_BS, new_BT.astype(old_BS.dtype), first_slot, axis=1)


@dataclass(frozen=True)
class Model:
    """An architecture and how it is run; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        config: the architecture.
        dtype: of the computation; norms, softmax and rotary angles are float32 always.
        remat: what the backward pass recomputes.
        attention: the kernel, `attend` unless the work crosses devices.
        layout: says where activations lie (`Placement.constrain`); `anywhere` leaves it open.
        dispatch: takes tokens to experts that lie on several devices (`Placement.dispatch`); `here` knows but one.
    """

    config: ModelConfig
    dtype: DType = "float32"
    remat: Remat = "none"
    attention: Attention = attend
    layout: Layout = anywhere
    dispatch: Dispatch = here

    def init(self, key: Array) -> dict:
        """Return random parameters: a nested dict of float32 arrays, layers stacked on the first axis."""
        return nn.unbox(self._boxed(key))

    def logical_axes(self) -> dict:
        """Return the parameters' tree with a tuple of axis names, or None for an unnamed axis, in each leaf's place."""
        boxed = jax.eval_shape(self._boxed, jax.random.key(0))
        is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
        return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)

    def apply(
        self,
        params: dict,
        view: View,
        *,
        taps: tuple[str, ...] = (),
        cache: Cache | None = None,
        row_keys_B: Array | None = None,
    ) -> Output:
        """Return hidden states after the last norm, in the compute dtype.

        Args:
            params: as `init` gives them, in any float dtype.
            view: what the model sees.
            taps: names out of `TAPS`; each comes back stacked by layer, [L, B, T, ...].
            cache: from `empty_cache` or an earlier call; this call's tokens are added to it.
            row_keys_B: a PRNG key for each row, which turns dropout on.
        """
        for name in taps:
            if name not in TAPS:
                raise UserError(f"a model has no tap {name!r}{did_you_mean(name, TAPS)}")
        output: Any = self._module(taps).apply({"params": params}, view, cache, row_keys_B)
        return output

    def watched(self, params: dict, view: View, watch: Any) -> dict:
        """Return what `watch`, an interceptor of each module's calls, puts into the collection `STATISTICS`."""
        module: Any = self._module()
        with nn.intercept_methods(watch):
            _, found = module.apply({"params": params}, view, mutable=[STATISTICS])
        return found[STATISTICS]

    def head(self, params: dict) -> Head:
        """Return the map from hidden states to logits: the head's own kernel, or the embedding when tied."""
        w_DV = params["embed"]["embedding"].T if self.config.tie_head else params["head"]["kernel"]
        return Head(w_DV, vocab_size=self.config.vocab_size, soft_cap=self.config.head_soft_cap)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Return a cache with room for `slots` tokens in each of `batch` rows."""
        c = self.config
        k_LBSGK = jnp.zeros((c.layers, batch, slots, c.kv_heads, c.head_width), self.dtype)
        segment_BS = jnp.zeros((batch, slots), jnp.int32)
        return Cache(k_LBSGK, jnp.zeros_like(k_LBSGK), segment_BS, jnp.zeros((), jnp.int32))

    def _module(self, taps: tuple[str, ...] = ()) -> Transformer:
        return Transformer(
            self.config, jnp.dtype(self.dtype), self.remat, self.attention, self.layout, self.dispatch, taps
        )

    def _boxed(self, key: Array) -> dict:
        token_BT = jnp.zeros((1, 1), jnp.int32)
        variables: Any = self._module().init(key, View(token_BT, token_BT, token_BT))
        return variables["params"]


def parameter_count(params: dict) -> int:
    """Return how many numbers a tree of arrays (or of their shapes) holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def path_text(path: tuple[Any, ...]) -> str:
    """Return a parameter's path as ``layers/attention/q/kernel``."""
    return "/".join(step.key for step in path)


def parameter_paths(params: dict) -> dict[str, Any]:
    """Return the leaves of a parameter tree by path."""
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
