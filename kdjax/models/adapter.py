"""Soft prompts in the directories that PEFT writes and loads (adapter_config.json, adapter_model.safetensors)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.errors import UserError
from kdjax.models import files
from kdjax.models.config import SOFT_PROMPT, ModelConfig
from kdjax.models.model_file import ModelFile, lazy
from kdjax.models.soft_prompt import slots
from kdjax.models.transformer import bare

ADAPTER, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
"""PEFT's names of both files, and of the one tensor."""

BASE = "base.json"
"""What a run has trained a part of, or an exported soft prompt stands before: our own file beside PEFT's."""

OWN = {
    "PROMPT_TUNING": {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None},
    "PREFIX_TUNING": {"prefix_projection": False},
}
"""PEFT's name of each kind that is read and written -> what adapter_config.json says of it alone."""


def tensors_of(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the soft prompt in PEFT's directory, of lazy tensors, for a base of such an architecture.

    Raises:
        UserError: an adapter of another kind, or one that does not fit.
    """
    kind = files.read_json(directory / ADAPTER).get("peft_type")
    if kind not in OWN:
        raise UserError(
            f"{directory} has an adapter of the kind {kind}; wanted {' or '.join(OWN)}; "
            "merge another into its base with PEFT"
        )
    found = files.map_safetensors(directory / WEIGHTS)
    c, array = config, found.get(TENSOR)
    width = c.width if kind == "PROMPT_TUNING" else c.layers * 2 * c.kv_heads * c.head_width
    if array is None or array.ndim != 2 or array.shape[1] != width or not len(array):
        shapes = {name: tensor.shape for name, tensor in found.items()}
        raise UserError(f"{directory / WEIGHTS} has {shapes}; wanted {TENSOR} of shape (tokens, {width}), as its base")
    if kind == "PROMPT_TUNING":
        return {"embedding": lazy(array)}
    both_PLGK = np.asarray(array).reshape(len(array), c.layers, 2, c.kv_heads, c.head_width)
    return {name: lazy(both_PLGK[:, :, n].swapaxes(0, 1)) for n, name in enumerate("kv")}


def export_soft_prompt(file: ModelFile, out: Path) -> Path:
    """Return `out`, a new directory with the soft prompt of a model alone, which PEFT loads onto the model's base.

    Beside PEFT's two files it has base.json, by which it is opened here with the very base that it was trained on.

    Raises:
        UserError: `out` is not empty, or PEFT or a name cannot say what base it is.
    """
    base, c = file.base, file.config
    if base is None or base.keep_layers or base.keep_encoder_layers:
        raise UserError(
            f"the soft prompt of {file.source} stands before a model cut to some layers, which no name of a base says; "
            "write that student first (kdjax student --keep-layers), and train the soft prompt on it"
        )
    own = {name: tensor.all() for name, tensor in file.tensors[SOFT_PROMPT].items()}
    if c.scale_embedding and "embedding" in own:
        raise UserError(
            f"{c.family} scales its embeddings, before or after PEFT adds the soft prompt as its transformers do; "
            "train student.soft_prompt.kind prefix for PEFT, or use the run as it is"
        )
    kind, heads, rows = "PROMPT_TUNING", c.heads, own.get("embedding")
    if rows is None:
        kind, heads = "PREFIX_TUNING", c.kv_heads
        rows = np.stack([own["k"], own["v"]], axis=1).transpose(2, 0, 1, 3, 4).reshape(slots(file.tensors), -1)
    config = {
        "base_model_name_or_path": _hub_id(base.source),
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": c.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(rows),
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "token_dim": c.width if kind == "PROMPT_TUNING" else c.kv_heads * c.head_width,
    }
    record = {"spec": asdict(base), "sha256": replace(file, tensors=bare(file.tensors)).sha256()}
    with files.whole_directory(Path(out)) as directory:
        files.write_json(directory / ADAPTER, config | OWN[kind])
        files.write_safetensors(directory / WEIGHTS, {TENSOR: lazy(rows)})
        files.write_json(directory / BASE, record)
    return Path(out)


def _hub_id(source: str) -> str:
    """Return what PEFT calls a model: of a known name the hub's."""
    from kdjax.models.fetch import KNOWN

    return KNOWN[source].hub_id if source in KNOWN else source
