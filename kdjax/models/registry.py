"""The families of models that kdjax knows. A new one is a file beside this and a row here."""

from __future__ import annotations

from kdjax.errors import UserError, did_you_mean
from kdjax.models.bert import BERT, DISTILBERT, ROBERTA
from kdjax.models.family import Family
from kdjax.models.gemma import GEMMA2, GEMMA3
from kdjax.models.gpt2 import GPT2
from kdjax.models.llama import LLAMA
from kdjax.models.mistral import MISTRAL, MIXTRAL
from kdjax.models.modernbert import MODERNBERT
from kdjax.models.neox import NEOX
from kdjax.models.olmo import OLMO2
from kdjax.models.phi import PHI3
from kdjax.models.qwen import QWEN2, QWEN3, QWEN3_MOE
from kdjax.models.smollm import SMOLLM3
from kdjax.models.t5 import T5

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "distilbert": DISTILBERT,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "modernbert": MODERNBERT,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "roberta": ROBERTA,
    "smollm3": SMOLLM3,
    "t5": T5,
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
