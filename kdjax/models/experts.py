"""Mixture of experts: a router picks a few mlps for each token, and no token is ever dropped.

Tokens are sorted by expert and go through `jax.lax.ragged_dot`; where experts lie on several devices, each takes the
tokens of its own, and the results are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kdjax.models.config import ModelConfig
from kdjax.models.layers import ACTIVATIONS, INIT_STD, Dims, branch_std, parameter
from kdjax.models.quantize import dense
from kdjax.shapes import Array


class Kernels(NamedTuple):
    """The matrices of all experts, or of a device's own."""

    gate_EDF: Array
    up_EDF: Array
    down_EFD: Array


class Picks(NamedTuple):
    """Each token's experts, and what their outputs are multiplied by."""

    expert_BTP: Array
    weight_BTP: Array


Local = Callable[[Array, Picks, Kernels, Array | int], Array]
Dispatch = Callable[[Local, Array, Picks, Kernels], Array]
"""``dispatch(local, x_BTD, picks, kernels)``: the sum of ``local(x_BTD, picks, own kernels, number of the first one)``
over the devices that experts are spread over."""


def here(local: Local, x_BTD: Array, picks: Picks, kernels: Kernels) -> Array:
    """Return ``local`` of all experts: they are all on this device."""
    return local(x_BTD, picks, kernels, 0)


class Kernel(nn.Module):
    """One matrix of each expert."""

    dims: Dims
    dtype: Any
    std: float = INIT_STD

    @nn.compact
    def __call__(self) -> Array:
        """Return them stacked, [E, inputs, outputs]."""
        return dense(parameter(self, "kernel", nn.initializers.normal(self.std), self.dims), self.dtype)


class Experts(nn.Module):
    """The feed-forward part of a layer with experts, all of them gated; its parameters are a stack of them.

    Paper: Shazeer et al. 2017, arXiv:1701.06538; the load-balancing loss is that of Fedus et al. 2021, Switch
    Transformers, arXiv:2101.03961, eq. 4 to 6.
    """

    config: ModelConfig
    dtype: Any
    dispatch: Dispatch

    @nn.compact
    def __call__(self, x_BTD: Array, scores_BTE: Array, is_real_BT: Array) -> tuple[Array, dict[str, Array]]:
        """Return Σ weight·expert(x) of each token by the router's scores, and how unevenly real tokens use experts.

        `load_balance` is E·Σ_e f_e·P_e over the tokens of this call, with f_e the picks of expert e per token and P_e
        the mean probability that the router gives it: experts_per_token where all are used alike.
        """
        c = self.config
        probs_BTE = jax.nn.softmax(scores_BTE.astype(jnp.float32), axis=-1)
        weight_BTP, expert_BTP = lax.top_k(probs_BTE, c.experts_per_token)
        if c.normalise_picks:
            weight_BTP = weight_BTP / weight_BTP.sum(axis=-1, keepdims=True)
        picks = Picks(expert_BTP, weight_BTP.astype(self.dtype))
        experts, wide, narrow = ("experts", c.experts), ("expert_mlp", c.mlp_width), ("embed", c.width)
        kernels = Kernels(
            Kernel((experts, narrow, wide), self.dtype, name="gate")(),
            Kernel((experts, narrow, wide), self.dtype, name="up")(),
            Kernel((experts, wide, narrow), self.dtype, branch_std(c), name="down")(),
        )
        y_BTD = self.dispatch(partial(through_experts, c.activation), x_BTD, picks, kernels)
        real, real_BT1 = jnp.maximum(jnp.sum(is_real_BT), 1), is_real_BT[:, :, None]
        picked_BTE = jnp.sum(jax.nn.one_hot(expert_BTP, c.experts), axis=2)
        share_E, mean_E = (jnp.sum(jnp.where(real_BT1, x, 0.0), axis=(0, 1)) / real for x in (picked_BTE, probs_BTE))
        return y_BTD, {"load_balance": c.experts * jnp.sum(share_E * mean_E)}


def through_experts(activation: str, x_BTD: Array, picks: Picks, kernels: Kernels, first: Array | int) -> Array:
    """Return Σ weight·down(act(gate(x))·up(x)) over those of each token's experts that the kernels are of.

    Args:
        activation: a row of `ACTIVATIONS`.
        x_BTD: the tokens.
        picks: their experts, counted over all devices.
        kernels: some experts, those from `first` on.
        first: the number of the first of them.
    """
    (b, t, d), own = x_BTD.shape, kernels.gate_EDF.shape[0]
    picked = picks.expert_BTP.reshape(-1) - first
    group = jnp.where((picked >= 0) & (picked < own), picked, own)  # others' tokens come last
    order = jnp.argsort(group, stable=True)
    sizes_E = jnp.bincount(group, length=own + 1)[:own].astype(jnp.int32)
    is_own_N1 = (group[order] < own)[:, None]
    token_N = order // picks.expert_BTP.shape[-1]
    x_ND = jnp.where(is_own_N1, x_BTD.reshape(-1, d)[token_N], 0)
    inner_NF = ACTIVATIONS[activation](lax.ragged_dot(x_ND, kernels.gate_EDF, sizes_E))
    inner_NF = inner_NF * lax.ragged_dot(x_ND, kernels.up_EDF, sizes_E)
    y_ND = lax.ragged_dot(inner_NF, kernels.down_EFD, sizes_E)
    # What ragged_dot leaves in rows of no group is not said: they are put out on both sides, in value and gradient.
    y_ND = jnp.where(is_own_N1, y_ND * picks.weight_BTP.reshape(-1)[order][:, None], 0)
    return jnp.zeros((b * t, d), y_ND.dtype).at[token_N].add(y_ND).reshape(b, t, d)
