"""The one Transformer of every family, and `Model`: its pure face over plain nested dicts of arrays.

Layers are stacked on a leading axis and run under `nn.scan`; what differs between families is in `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.errors import UserError, did_you_mean
from kdjax.models.attention import Attention, Cache, Prefix, attend, see
from kdjax.models.blocks import Layer, Own, Shared
from kdjax.models.config import GIST, SOFT_PROMPT, DType, ModelConfig, Remat
from kdjax.models.experts import Dispatch, here
from kdjax.models.layers import (
    ACTIVATIONS,
    Embedding,
    HeadParameters,
    Layout,
    Linear,
    Norm,
    RelativeBias,
    anywhere,
    dropout,
)
from kdjax.models.positions import alibi, rope_waves, sinusoids
from kdjax.models.quantize import dequantized
from kdjax.shapes import Array, Head, Output, View

TAPS = ("hidden", "q", "k", "v")
"""What `Model.apply` can tap in each layer: its output, and the queries, keys and values that attention sees."""

STATISTICS = "statistics"
"""The collection that what is measured inside a call is put into (`kdjax.models.importance`), stacked by layer."""

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nn.Module):
    """Layers that are scanned, with what they share and the norm after the last; an encoder as it is."""

    config: ModelConfig
    dtype: Any
    remat: Remat
    attention: Attention
    layout: Layout
    dispatch: Dispatch
    taps: tuple[str, ...] = ()
    offloaded: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array, view: View, row_keys_B: Array | None) -> Array:
        """Return what an encoder's layers make of embedded tokens."""
        return self._run(x_BTD, view, row_keys_B)[0]

    def _run(
        self,
        x_BTD: Array,
        view: View,
        row_keys_B: Array | None,
        encoded_BSD: Array | None = None,
        cache: Cache | None = None,
        prefix: Prefix | None = None,
        is_gist_BT: Array | None = None,
    ) -> tuple[Array, dict[str, Array], dict[str, Array], Cache | None]:
        """Return the hidden states, the taps, further sums, and the cache with these tokens added."""
        c, first_slot, slots, encoder_slots = self.config, 0, None, None
        segment_BS, encoder_segment_BS = view.segment_BT, None if view.encoder is None else view.encoder.segment_BT
        if cache is not None:
            first_slot, slots, encoder_slots = cache.used, cache.own, cache.encoder
            segment_BS = jax.lax.dynamic_update_slice_in_dim(cache.segment_BS, view.segment_BT, first_slot, axis=1)
            encoder_segment_BS = cache.encoder_segment_BS if encoder_segment_BS is None else encoder_segment_BS
        sight = see(view.segment_BT, segment_BS, first_slot, causal=c.causal)
        sight = replace(sight, scale=c.attention_scale, soft_cap=c.attention_soft_cap)
        if is_gist_BT is not None and cache is None:
            sight = sight.past_gists(is_gist_BT)
        if prefix is not None:
            sight = sight.behind(view.position_BT, prefix.tokens)
        if c.positions == "alibi":
            sight = replace(sight, bias_BHTS=alibi(c.heads, sight.back_BTS))
        if c.positions == "relative":
            sight = replace(sight, bias_BHTS=RelativeBias(c, name="relative")(sight.back_BTS))
        encoder_sight = None
        if c.encoder_layers:
            if encoder_segment_BS is None:
                raise UserError("an encoder-decoder wants a view with an encoder's, or a cache that has seen it")
            encoder_sight = see(view.segment_BT, encoder_segment_BS, causal=False)
            encoder_sight = replace(encoder_sight, scale=c.attention_scale)
        waves, local_waves = (
            rope_waves(view.position_BT, view.segment_BT, c.head_width, rope) if rope is not None else None
            for rope in (c.rope if c.positions == "rope" else None, c.local_rope if c.windows else None)
        )
        is_rotated_L, is_normed_L = (
            jnp.array([n not in without for n in range(c.layers)]) if without else None
            for without in (c.unrotated, c.unnormed)
        )
        windows_L = jnp.array(c.windows) if c.windows else None
        own = Own(jnp.arange(c.layers), windows_L, is_rotated_L, is_normed_L, prefix)
        is_real_BT = view.segment_BT > 0
        shared = Shared(sight, waves, local_waves, first_slot, row_keys_B, is_real_BT, encoded_BSD, encoder_sight)
        layers = self._layers()(c, self.dtype, self.attention, self.layout, self.dispatch, self.taps, name="layers")
        (x_BTD, slots), (taps, encoder_slots, aux) = layers((x_BTD, slots), own, encoder_slots, shared)
        if cache is not None:
            used = cache.used + view.tokens_BT.shape[1]
            cache = Cache(slots, segment_BS, used, encoder_slots, encoder_segment_BS)
        if c.norms != "sum":
            x_BTD = Norm(c, self.dtype, name="final_norm")(x_BTD)
        return x_BTD, taps, jax.tree.map(partial(jnp.mean, axis=0), aux), cache

    def _layers(self) -> Any:
        layer: Any = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        if self.offloaded:
            layer = nn.map_variables(layer, "params", trans_in_fn=to_device)
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


def to_device(tree: Any) -> Any:
    """Return arrays in the devices' own memory."""
    return jax.device_put(tree, jax.memory.Space.Device)


class Transformer(Stack):
    """Embedding, the layers, what stands before the head; the head's kernel is declared here and applied by the loss.

    An encoder-decoder is a decoder whose layers also see what a second stack makes of `view.encoder`.
    """

    @nn.compact
    def __call__(
        self,
        view: View,
        cache: Cache | None = None,
        row_keys_B: Array | None = None,
        prefix: Prefix | None = None,
        gist_PD: Array | None = None,
    ) -> Output:
        """Return hidden states as the head takes them, taps stacked by layer, and the cache with these tokens added."""
        c = self.config
        embed, encoded_BSD = self._embedding(gist_PD), None
        is_gist_BT = None if gist_PD is None else view.tokens_BT < 0
        if prefix is not None:
            view = replace(view, position_BT=view.position_BT + prefix.tokens)
        if view.encoder is not None:
            keys_B = None if row_keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, 1)
            run = self.remat, self.attention, self.layout, self.dispatch
            encoder = Stack(encoder_config(c), self.dtype, *run, name="encoder")
            encoded_BSD = encoder(embed(view.encoder, keys_B), view.encoder, keys_B)
        seen = view, row_keys_B, encoded_BSD, cache, prefix, is_gist_BT
        x_BTD, taps, aux, cache = self._run(embed(view, row_keys_B), *seen)
        return Output(self._before_head(x_BTD), taps, aux, cache)

    def _embedding(self, gist_PD: Array | None) -> Callable[[View, Array | None], Array]:
        """Return the map from a view to the sum of its embeddings, scaled and normalised where the config says so."""
        c = self.config
        table = partial(Embedding, width=c.width, dtype=self.dtype, layout=self.layout)
        tokens = table("vocab", c.vocab_size, name="embed")
        places = table("position", c.max_positions + c.first_position, name="positions")
        types, norm = table(None, c.token_types, name="types"), Norm(c, self.dtype, name="embed_norm")

        def embed(view: View, row_keys_B: Array | None) -> Array:
            x_BTD = tokens(view.tokens_BT if gist_PD is None else jnp.maximum(view.tokens_BT, 0))
            if gist_PD is not None:
                own_BTD = jnp.take(gist_PD, jnp.maximum(-1 - view.tokens_BT, 0), axis=0).astype(self.dtype)
                x_BTD = jnp.where((view.tokens_BT < 0)[:, :, None], own_BTD, x_BTD)
            if c.scale_embedding:
                x_BTD = x_BTD * jnp.asarray(c.width**0.5, self.dtype)
            if c.positions == "learned":
                x_BTD = x_BTD + places(view.position_BT + c.first_position)
            if c.positions == "sinusoidal":
                x_BTD = x_BTD + sinusoids(view.position_BT, c.width).astype(self.dtype)
            if c.token_types:
                x_BTD = x_BTD + types(jnp.zeros_like(view.tokens_BT) if view.type_BT is None else view.type_BT)
            x_BTD = norm(x_BTD) if c.embedding_norm else x_BTD
            return self.layout(dropout(x_BTD, row_keys_B, 0, c.dropout), ("batch", "sequence", None))

        return embed

    def _before_head(self, x_BTD: Array) -> Array:
        """Return what the head is applied to; declare the head's own parameters."""
        c, narrow = self.config, (("embed", self.config.width),)
        name = head_name(c)
        if c.head_transform != "none":
            square = Linear(narrow, ((None, c.width),), c.mlp_bias, self.dtype, name=f"{name}_transform")
            x_BTD = ACTIVATIONS[c.head_transform](square(x_BTD))
        if c.head_norm:
            x_BTD = Norm(c, self.dtype, name=f"{name}_norm")(x_BTD)
        outputs = ("vocab", c.vocab_size) if not c.labels else (None, c.labels)
        if self.is_initializing():
            HeadParameters(narrow, outputs, not c.tie_head, c.head_bias, name=name)()
        return x_BTD


def encoder_config(config: ModelConfig) -> ModelConfig:
    """Return the architecture of the encoder in an encoder-decoder: the decoder's, but that each token sees all."""
    own: Any = {"windows": (), "unrotated": (), "unnormed": ()}
    return replace(config, layers=config.encoder_layers, encoder_layers=0, causal=False, **own)


def head_name(config: ModelConfig) -> str:
    """Return what the head's parameters are called."""
    return "classifier" if config.labels else "head"


def bare(params: dict) -> dict:
    """Return the parameters without a soft prompt and a gist."""
    return {name: tree for name, tree in params.items() if name not in (SOFT_PROMPT, GIST)}


@dataclass(frozen=True)
class Model:
    """An architecture and how it is run; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        config: the architecture.
        dtype: of the computation; norms, softmax and rotary angles are float32 always.
        remat: what the backward pass recomputes.
        attention: the kernel; `Placement.attention(attend)` where the tokens of a row lie on several devices.
        layout: says where activations lie (`Placement.constrain`); `anywhere` leaves it open.
        dispatch: takes tokens to experts that lie on several devices (`Placement.dispatch`); `here` knows but one.
        offloaded: the parameters of the layers lie in the host's memory; each layer's are fetched for its turn.
    """

    config: ModelConfig
    dtype: DType = "float32"
    remat: Remat = "none"
    attention: Attention = attend
    layout: Layout = anywhere
    dispatch: Dispatch = here
    offloaded: bool = False

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
        prefix: Prefix | None = None,
    ) -> Output:
        """Return hidden states as the head takes them, in the compute dtype.

        Args:
            params: as `init` gives them, in any float dtype; a soft prompt among them stands before every example. With
                a gist among them tokens below 0 are its places (with a cache nothing may follow these in one call).
            view: what the model sees.
            taps: names out of `TAPS`; each comes back stacked by layer, [L, B, T, ...].
            cache: from `empty_cache` or an earlier call; this call's tokens are added to it.
            row_keys_B: a PRNG key for each row, which turns dropout on.
            prefix: what stands before every example of each row: real tokens of every segment see all of it, in a layer
                with a window what of it lies in that. Positions count on after it: P is added to `view.position_BT`.

        Raises:
            UserError: an unknown tap, a prefix of other shapes, a model that takes none, a kernel that takes no gist.
        """
        for name in taps:
            if name not in TAPS:
                raise UserError(f"a model has no tap {name!r}{did_you_mean(name, TAPS)}")
        prefix = self.standing(params, prefix)
        if prefix is not None:
            prefix.check(self.config, view.tokens_BT.shape[0])
        gist_PD = params.get(GIST, {}).get("embedding")
        kernel = getattr(self.attention, "kernel", self.attention)  # of one that crosses devices
        if gist_PD is not None and kernel is not attend:
            raise UserError(
                "a gist wants the kernel kdjax.models.attention.attend, which reads the mask; leave out one"
            )
        output: Any = self._module(taps).apply({"params": bare(params)}, view, cache, row_keys_B, prefix, gist_PD)
        return output

    def standing(self, params: dict, prefix: Prefix | None = None) -> Prefix | None:
        """Return what stands before every example: the soft prompt among the parameters, and then `prefix`.

        Vectors in the place of embeddings are read once for all examples: attention is causal, so what it makes of them
        is the same whatever follows. To the model they are tokens of a vocabulary of their own.

        Raises:
            UserError: a soft prompt of a model that takes no prefix.
        """
        soft = params.get(SOFT_PROMPT)
        if soft is None:
            return prefix
        self.config.check_prefix()
        if "embedding" in soft:
            tokens = soft["embedding"].shape[0]
            model = replace(self, config=replace(self.config, vocab_size=tokens))
            own = model.read(bare(params) | {"embed": soft}, jnp.arange(tokens)[None])
        else:
            own = Prefix(soft["k"][:, None], soft["v"][:, None])
        return own if prefix is None else own.then(prefix)

    def read(self, params: dict, tokens_BP: Array, before: Prefix | None = None, first_position: int = 0) -> Prefix:
        """Return the prefix that rows of tokens are, behind `before`, in the compute dtype."""
        ones_BP = jnp.ones_like(tokens_BP)
        view = View(tokens_BP, ones_BP, jnp.cumsum(ones_BP, axis=1) - 1 + first_position)
        cache = self.apply(params, view, cache=self.empty_cache(*tokens_BP.shape), prefix=before).cache
        return Prefix(*cache.own)

    def watched(self, params: dict, view: View, watch: Any) -> dict:
        """Return what `watch`, an interceptor of each module's calls, puts into the collection `STATISTICS`."""
        module: Any = self._module()
        with nn.intercept_methods(watch):
            _, found = module.apply({"params": params}, view, mutable=[STATISTICS])
        return found[STATISTICS]

    def head(self, params: dict) -> Head:
        """Return the map from hidden states to logits: the head's own kernel, or the embedding when tied."""
        c, own = self.config, params.get(head_name(self.config), {})
        w_DV = params["embed"]["embedding"].T if c.tie_head else own["kernel"]
        w_DV = dequantized(w_DV, self.dtype)
        return Head(w_DV, own.get("bias"), c.labels or c.vocab_size, c.head_soft_cap, c.head_scale)

    def head_part(self, tree: dict) -> dict:
        """Return what `head` is made of, out of the parameters or a tree like them."""
        if not self.config.tie_head:
            return {head_name(self.config): tree[head_name(self.config)]}
        biased = {name: tree[name] for name in (head_name(self.config),) if name in tree}
        return {"embed": {"embedding": tree["embed"]["embedding"]}} | biased

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Return a cache with room for `slots` tokens in each of `batch` rows; an encoder's view adds its own."""
        c = self.config
        k_LBSGK = jnp.zeros((c.layers, batch, slots, c.kv_heads, c.head_width), self.dtype)
        segment_BS = jnp.zeros((batch, slots), jnp.int32)
        return Cache((k_LBSGK, jnp.zeros_like(k_LBSGK)), segment_BS, jnp.zeros((), jnp.int32))

    def _module(self, taps: tuple[str, ...] = ()) -> Transformer:
        across = self.attention, self.layout, self.dispatch
        return Transformer(self.config, jnp.dtype(self.dtype), self.remat, *across, taps, self.offloaded)

    def _boxed(self, key: Array) -> dict:
        token_BT = jnp.zeros((1, 1), jnp.int32)
        view = View(token_BT, token_BT, token_BT)
        view = replace(view, encoder=view) if self.config.encoder_layers else view
        variables: Any = replace(self, offloaded=False)._module().init(key, view)
        return variables["params"]
