"""The families of models that kdjax knows. A new one is a file beside this and a row here."""

from __future__ import annotations

from kdjax.errors import UserError, did_you_mean
from kdjax.models.family import Family
from kdjax.models.gemma import GEMMA2, GEMMA3
from kdjax.models.gpt2 import GPT2
from kdjax.models.llama import LLAMA
from kdjax.models.mistral import MISTRAL
from kdjax.models.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
"""``model_type`` of a config.json -> family."""


def family_named(name: object) -> Family:
    """Return a family.

    Raises:
        UserError: there is none of that name.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"model_type is {name!r}, a family kdjax does not know{did_you_mean(str(name), FAMILIES)}")
    return FAMILIES[name]
