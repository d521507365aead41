"""How much each layer, head, mlp neuron and channel of a model does on real text, from forward passes alone.

What is measured is summed where it arises, so that no activation outlives its layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdjax.models.blocks import Layer
from kdjax.models.layers import Linear, Norm
from kdjax.models.paths import parameter_paths
from kdjax.models.transformer import STATISTICS, Model
from kdjax.shapes import Array, View


@dataclass(frozen=True)
class Importance:
    """Scores, higher for what does more; comparable within a layer and, those of layers and channels, throughout.

    With a(b, t) the size of what a unit gives at token t of row b, its score is √Σ_b (mean_t a)². Paper: Muralidharan
    et al. 2024, Minitron, arXiv:2407.14679, section 2.2, aggregated over rows by L2 and over tokens by the mean.

    Attributes:
        layer_L: 1 − mean cos(x, y) of a layer's input x and output y over tokens. Paper: Men et al. 2024, ShortGPT,
            arXiv:2403.03853, eq. 1.
        head_LH: a is the L2 norm of a head's output before the output projection.
        neuron_LF: a is the absolute value that a neuron hands to `down`; None where mlps are experts.
        channel_D: a is the absolute value of a norm's output; the sum of the scores at all norms over the width.
        expert_LE: the share of all tokens' probability that the router gives an expert; None without experts.
        encoder_layer_M: as layer_L, of the encoder beside a decoder, on its tokens; None without one, as are these:
        encoder_head_MH: as head_LH; a decoder's head scores the sum of what it does in both its attentions.
        encoder_neuron_MF: as neuron_LF.
    """

    layer_L: np.ndarray
    head_LH: np.ndarray
    neuron_LF: np.ndarray | None
    channel_D: np.ndarray
    expert_LE: np.ndarray | None
    encoder_layer_M: np.ndarray | None = None
    encoder_head_MH: np.ndarray | None = None
    encoder_neuron_MF: np.ndarray | None = None


def statistics(model: Model, params: dict, view: View) -> dict[str, Any]:
    """Return sums over the rows of a batch, for `importance`: a tree that adds up over batches."""
    views = {"tokens": view} if view.encoder is None else {"tokens": view, "encoder_tokens": view.encoder}
    real = {name: jnp.asarray(seen.segment_BT > 0, jnp.float32) for name, seen in views.items()}

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__":
            real_BT = real["encoder_tokens" if module.path[:1] == ("encoder",) else "tokens"]
            if (found := _seen(module, args, result, real_BT)) is not None:
                module.put_variable(STATISTICS, "sum", found)
        return result

    found = model.watched(params, view, watch)
    if model.config.unnormed:  # what the norm would give there is computed, and read by nobody
        unread = jnp.array(model.config.unnormed)
        found["layers"]["attention_norm"]["sum"] = found["layers"]["attention_norm"]["sum"].at[unread].set(0)
    return {**{name: jnp.sum(real_BT) for name, real_BT in real.items()}, **found}


def _seen(module: nn.Module, args: tuple[Any, ...], result: Any, real_BT: Array) -> Array | None:
    """Return the sum that is wanted of a module's call, None of one that nothing is measured at."""
    if isinstance(module, Layer):
        return jnp.sum(real_BT * (1.0 - _cosine(args[0][0], result[0][0])))
    if isinstance(module, Norm) and module.name not in ("q_norm", "k_norm"):
        return _row_squares(jnp.abs(result), real_BT)
    if isinstance(module, Linear) and module.name == "down":
        return _row_squares(jnp.abs(args[0]), real_BT)
    if isinstance(module, Linear) and module.name == "out":
        return _row_squares(jnp.linalg.norm(args[0].astype(jnp.float32), axis=-1), real_BT)
    if isinstance(module, Linear) and module.name == "router":
        return jnp.einsum("bt,bte->e", real_BT, jax.nn.softmax(result.astype(jnp.float32)))
    return None


def _cosine(x_BTD: Array, y_BTD: Array) -> Array:
    x_BTD, y_BTD = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    norms_BT = jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(y_BTD, axis=-1)
    return jnp.sum(x_BTD * y_BTD, axis=-1) / jnp.maximum(norms_BT, jnp.finfo(jnp.float32).tiny)


def _row_squares(size_BTF: Array, real_BT: Array) -> Array:
    """Return Σ_b (mean over the real tokens of row b)², for each unit."""
    tokens_B1 = jnp.maximum(jnp.sum(real_BT, axis=1), 1.0)[:, None]
    mean_BF = jnp.einsum("bt,btf->bf", real_BT, size_BTF.astype(jnp.float32)) / tokens_B1
    return jnp.sum(jnp.square(mean_BF), axis=0)


def importance(sums: Iterable[Mapping[str, Any]]) -> Importance:
    """Return the scores from the `statistics` of some batches."""
    total = jax.tree.map(lambda *parts: np.sum([np.asarray(part, np.float64) for part in parts], axis=0), *sums)
    layers, tokens = total["layers"], total["tokens"]
    encoder = (None, None, None)
    if "encoder" in total:
        encoder = _of_stack(total["encoder"]["layers"], total["encoder_tokens"])
    norms = [found for path, found in parameter_paths(total).items() if path.endswith("_norm/sum")]
    return Importance(
        *_of_stack(layers, tokens),
        sum((np.sqrt(found).reshape(-1, found.shape[-1]).sum(axis=0) for found in norms), np.zeros(())),
        layers["router"]["sum"] / tokens if "router" in layers else None,
        *encoder,
    )


def _of_stack(layers: Mapping[str, Any], tokens: np.ndarray) -> tuple[Any, Any, Any]:
    """Return the scores of a stack's layers [L], heads [L, H] and neurons [L, F], the last None of experts."""
    heads = [np.sqrt(layers[name]["out"]["sum"]) for name in ("attention", "cross") if name in layers]
    neurons = np.sqrt(layers["mlp"]["down"]["sum"]) if "mlp" in layers else None
    return layers["sum"] / tokens, sum(heads), neurons
