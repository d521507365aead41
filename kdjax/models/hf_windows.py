"""Which layers see a window only, in a config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdjax.errors import UserError
from kdjax.models.config import MOST
from kdjax.models.family import read

KINDS = ("full_attention", "sliding_attention")


def read_windows(hf: dict[str, Any], layers: int, slides: Callable[[int], bool], window: int) -> tuple[int, ...]:
    """Return `ModelConfig.windows`.

    Args:
        hf: the config.json.
        layers: how many there are.
        slides: which of them have a window where layer_types does not say.
        window: what an absent sliding_window means.

    Raises:
        UserError: layer_types names another kind of layer, or not one for each.
    """
    if layers > MOST:
        raise UserError(f"num_hidden_layers is {layers}; wanted at most {MOST:,}")
    types = read(hf, "layer_types", list, [KINDS[slides(layer)] for layer in range(layers)])
    unknown = [kind for kind in types if kind not in KINDS]
    if unknown:
        raise UserError(f"layer_types has {unknown[0]!r}, which kdjax does not compute; wanted {' or '.join(KINDS)}")
    if len(types) != layers:
        raise UserError(f"layer_types names {len(types)} layers; wanted {layers}, as num_hidden_layers says")
    if KINDS[1] not in types:
        return ()
    window = read(hf, "sliding_window", int, window)
    return tuple(window if kind == KINDS[1] else 0 for kind in types)


def write_windows(windows: tuple[int, ...]) -> dict[str, Any]:
    """Return the keys of a config.json that say it of layers that have one window or none."""
    return {"sliding_window": max(windows), "layer_types": [KINDS[window > 0] for window in windows]}
