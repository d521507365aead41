"""Rotary positions in a config.json, in the styles of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from kdjax.errors import UserError
from kdjax.models.config import Rope
from kdjax.models.family import read, refuse_others


def read_rope(hf: dict[str, Any], max_positions: int, share: float | None = None) -> Rope:
    """Return the rotary positions of a config.json.

    Args:
        hf: the config.json; `rope_scaling` is version 4's, beside `rope_theta`, and `rope_parameters` version 5's.
        max_positions: what an absent original_max_position_embeddings means.
        share: what an absent partial_rotary_factor means; None where a family rotates the whole width always.

    Raises:
        UserError: a kind of scaling that is not computed here, or one of its numbers is missing or out of range.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = hf.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{key} is {given!r}; wanted an object")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", *MORE):
        wanted = ", ".join(("default", *MORE))
        raise UserError(f"{key} has rope_type {kind!r}, which kdjax does not compute; wanted one of {wanted}")
    parameters = hf.get("rope_parameters")
    beside = parameters if isinstance(parameters, dict) and "rope_theta" in parameters else hf
    theta = read(given if "rope_theta" in given else beside, "rope_theta", float, 10_000.0)
    if share is None:
        refuse_others(given, {"partial_rotary_factor": (None, 1, 1.0)})
    rotated: float = read(given, "partial_rotary_factor", float, share or 1.0)
    if kind == "default":
        return Rope(theta, share=rotated)
    return Rope(theta, kind, read(given, "factor", float), share=rotated, **MORE[kind](given, max_positions))


ORIGINAL = "original_max_position_embeddings"


def _llama3(given: dict[str, Any], max_positions: int) -> dict[str, Any]:
    low, high = read(given, "low_freq_factor", float), read(given, "high_freq_factor", float)
    return {"made_for": read(given, ORIGINAL, int, max_positions), "low_frequency": low, "high_frequency": high}


def _yarn(given: dict[str, Any], max_positions: int) -> dict[str, Any]:
    factor, names, weights = read(given, "factor", float), ("mscale", "mscale_all_dim"), [1.0, 0.0]
    if all(given.get(name) for name in names):
        weights = [read(given, name, float) for name in names]
    over, under = (_mscale(factor, weight) for weight in weights)
    return {
        "made_for": read(given, ORIGINAL, int, max_positions),
        "beta_slow": read(given, "beta_slow", float, 1.0),
        "beta_fast": read(given, "beta_fast", float, 32.0),
        "truncate": read(given, "truncate", bool, True),
        "attention_factor": read(given, "attention_factor", float, over / under),
    }


def _mscale(factor: float, weight: float) -> float:
    """Return 1 + 0.1·weight·ln(factor). Paper: Peng et al. 2023, YaRN, arXiv:2309.00071, eq. 22."""
    return 1.0 + 0.1 * weight * math.log(max(factor, 1.0))


MORE: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "linear": lambda given, max_positions: {},
    "dynamic": lambda given, max_positions: {"made_for": max_positions},
    "yarn": _yarn,
    "llama3": _llama3,
}
"""Kind -> what it reads besides the factor."""


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return the keys of a config.json that say it; transformers 4 and 5 both read version 4's style."""
    if rope.scaling == "none":
        return {"rope_theta": rope.theta}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("yarn", "llama3"):
        scaling[ORIGINAL] = rope.made_for
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if rope.scaling == "yarn":
        scaling |= {name: getattr(rope, name) for name in ("beta_slow", "beta_fast", "truncate", "attention_factor")}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
