"""Between Hugging Face's directories and our parameters, both ways, without torch."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from kdjax.errors import UserError, listed
from kdjax.models import files
from kdjax.models.config import DType, ModelConfig
from kdjax.models.family import Family, sizes_of, to_disk
from kdjax.models.model_file import Index, LazyTensor, ModelFile, lazy, stacked
from kdjax.models.paths import parameter_paths, path_text
from kdjax.models.registry import family_named
from kdjax.models.transformer import Model

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 10**9
"""Weights above this are written as several files."""

STORED = {"float32": "F32", "bfloat16": "BF16"}
"""The dtypes weights can be exported in, and their safetensors names."""

TOKENIZER_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What belongs to a tokenizer.json and may lie beside it."""

DECODER_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
}
"""What a tokenizer_config.json says unless it says otherwise: no token types, which version 4 would add."""


def open_directory(directory: Path) -> ModelFile:
    """Return the model in a Hugging Face directory.

    Raises:
        UserError: something in it is missing, damaged, or not what config.json says; or is not computed here.
    """
    path = directory / "config.json"
    hf = files.read_json(path)
    try:
        family = family_named(hf.get("model_type"))
        config = family.config_from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    on_disk = _mapped(directory)
    config = _untied(family, config, on_disk)
    tensors = _tensors(directory, family, config, on_disk)
    tokenizer = directory / "tokenizer.json"
    return ModelFile(config, tensors, str(directory), tokenizer if tokenizer.is_file() else None)


def _untied(family: Family, config: ModelConfig, on_disk: dict[str, np.ndarray]) -> ModelConfig:
    """Return the config, its head not tied where another is on disk than the embedding: transformers 5 goes by that."""
    if not config.tie_head or "head/kernel" not in family.weights:
        return config
    head, embedding = (on_disk.get(family.weights[path].name) for path in ("head/kernel", "embed/embedding"))
    is_copy = head is None or embedding is None or np.array_equal(head, embedding)
    return config if is_copy else replace(config, tie_head=False)


def _tensors(directory: Path, family: Family, config: ModelConfig, on_disk: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the tree of lazy tensors, every tensor on disk accounted for."""
    sizes = sizes_of(config)
    if config.encoder_layers + config.layers * max(1, config.experts) > len(on_disk):
        experts = f" of {config.experts} experts" if config.experts else ""
        raise UserError(
            f"{directory} has {len(on_disk)} tensors, too few for the {config.layers} layers{experts} of config.json"
        )
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    weights = {path: family.weights_of(config)[path] for path in parameter_paths(shapes)}
    names = {path: weight.names(sizes) for path, weight in weights.items()}
    found = _match(directory, family, on_disk, {name for of_path in names.values() for name in of_path.values()})

    def leaf(path: str) -> LazyTensor:
        weight, parts = weights[path], {}
        for layer in range(weight.first):
            parts[(layer,)] = lazy(np.ones([sizes[letter] for letter in weight.ours], np.float32))
        for index, name in names[path].items():
            tensor, wanted = found[name], weight.disk_shape(sizes)
            if tensor.dtype not in files.DTYPES.values():
                raise UserError(f"{directory}: {name} holds {tensor.dtype}; wanted {', '.join(files.DTYPES)}")
            if tensor.shape != wanted:
                raise UserError(f"{directory}: {name} has shape {tensor.shape}; its config.json says {wanted}")
            parts[index] = lazy(weight.from_disk(tensor, sizes))
        return _put_together(parts)

    return jax.tree_util.tree_map_with_path(lambda path, _: leaf(path_text(path)), shapes)


def _put_together(parts: dict[tuple[int, ...], LazyTensor]) -> LazyTensor:
    """Return one tensor of parts by their index in its leading axes, in order."""
    if () in parts:
        return parts[()]
    rows: dict[int, dict[tuple[int, ...], LazyTensor]] = {}
    for (first, *rest), part in parts.items():
        rows.setdefault(first, {})[tuple(rest)] = part
    return stacked([_put_together(row) for row in rows.values()])


def _match(directory: Path, family: Family, on_disk: dict[str, np.ndarray], wanted: set[str]) -> dict[str, np.ndarray]:
    """Return the wanted tensors by their full names, having checked that all are there and no other is."""
    found: dict[str, np.ndarray] = {}
    others = []
    for name, tensor in on_disk.items():
        full = family.prefix + name if family.prefix + name in wanted else name
        if full in found:
            raise UserError(f"{directory} has the tensor {full} twice, with and without {family.prefix!r}")
        if full in wanted:
            found[full] = tensor
        elif not re.fullmatch(family.ignored, name.removeprefix(family.prefix)):
            others.append(name)
    missing = wanted - found.keys()
    if missing:
        raise UserError(f"{directory} lacks {len(missing)} of the tensors its config.json asks for: {listed(missing)}")
    if others:
        raise UserError(
            f"{directory} has {len(others)} more than the tensors its config.json asks for: {listed(others)}"
        )
    return found


def _mapped(directory: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a directory's safetensors files by name."""
    tensors: dict[str, np.ndarray] = {}
    for name in _weight_files(directory):
        more = files.map_safetensors(directory / name)
        twice = tensors.keys() & more.keys()
        if twice:
            raise UserError(f"{directory / name}: tensor {min(twice)} is in another file of {directory} too")
        tensors |= more
    return tensors


def _weight_files(directory: Path) -> list[str]:
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not (directory / INDEX).is_file():
        pickled = [p.name for p in sorted(directory.iterdir()) if p.suffix in files.PICKLED]
        if pickled:
            raise UserError(
                f"{directory} has its weights pickled ({pickled[0]}), which can run code and is never read;"
                " wanted model.safetensors"
            )
        raise UserError(f"{directory} has no model.safetensors and no {INDEX}")
    weight_map = files.read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{directory / INDEX} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*\.safetensors", name):
            raise UserError(f"{directory / INDEX} names {name!r}; wanted plain names of .safetensors files beside it")
        if not (directory / name).is_file():
            raise UserError(f"{directory} lacks {name}, which its index names; get it again")
    return names


def export(
    config: ModelConfig,
    params: dict[str, Any],
    out: Path,
    tokenizer: Path | None,
    dtype: DType = "float32",
) -> Path:
    """Return `out`, a new Hugging Face directory that transformers 4 and 5 load.

    Args:
        config: the model's architecture.
        params: its parameters: jax or numpy arrays, or LazyTensors.
        out: must not exist, or be empty.
        tokenizer: a tokenizer.json; what belongs to it and lies beside it is copied too.
        dtype: of the weights on disk.

    Raises:
        UserError: `out` is not empty, the family cannot say such an architecture, or the parameters do not fit it.
    """
    family = family_named(config.family)
    if dtype not in STORED:
        raise UserError(f"dtype is {dtype!r}; wanted one of {', '.join(STORED)}")
    hf = hf_config(config)
    with files.whole_directory(Path(out)) as directory:
        ids = _write_tokenizer(tokenizer, directory)
        files.write_json(directory / "config.json", ids | hf | {"torch_dtype": dtype})
        _write_weights(directory, disk_tensors(family, config, params), STORED[dtype])
    return Path(out)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of an architecture.

    Raises:
        UserError: it cannot say all of it.
    """
    family = family_named(config.family)
    hf = family.config_to_hf(config)
    back = family.config_from_hf(hf)
    for name, value in vars(replace(config, dropout=0.0)).items():
        if getattr(back, name) != value:
            raise UserError(f"Hugging Face's {config.family} has no {name}={value!r}; such a model cannot be exported")
    return hf


def disk_tensors(family: Family, config: ModelConfig, params: dict[str, Any]) -> dict[str, LazyTensor]:
    """Return the tensors to write by their full names, put together from `params` when read."""
    leaves = parameter_paths(params)
    shapes = parameter_paths(jax.eval_shape(Model(config).init, jax.random.key(0)))
    if {path: leaf.shape for path, leaf in leaves.items()} != {path: leaf.shape for path, leaf in shapes.items()}:
        raise UserError(f"the parameters do not fit their architecture {config}")
    sizes, weights = sizes_of(config), family.weights_of(config)

    @lru_cache(maxsize=3)  # the layers of a parameter follow each other, those of fused ones together
    def whole(path: str) -> np.ndarray:
        leaf = leaves[path]
        return leaf.all() if isinstance(leaf, LazyTensor) else np.asarray(leaf)

    def tensor(paths: list[str], part: tuple[int, ...]) -> LazyTensor:
        fused = [weights[path] for path in paths]

        def read(index: Index) -> np.ndarray:
            return to_disk(fused, [whole(path)[part] for path in paths], sizes)[index]

        return LazyTensor(fused[0].disk_shape(sizes), read)

    together: dict[str, list[str]] = {}
    for path, weight in weights.items():
        if path in leaves:
            together.setdefault(weight.name, []).append(path)
    return {
        name: tensor(paths, part)
        for paths in together.values()
        for part, name in weights[paths[0]].names(sizes).items()
    }


def _write_weights(directory: Path, tensors: dict[str, LazyTensor], stored: str) -> None:
    """Write one file, or several with an index when there is much."""
    groups: list[dict[str, LazyTensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        more = math.prod(tensor.shape) * files.DTYPES[stored].itemsize
        if groups[-1] and size + more > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size, total = size + more, total + more
    if len(groups) == 1:
        return files.write_safetensors(directory / "model.safetensors", tensors, stored)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        files.write_safetensors(directory / file, group, stored)
        weight_map |= dict.fromkeys(group, file)
    files.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(tokenizer: Path | None, directory: Path) -> dict[str, Any]:
    """Copy a tokenizer and what belongs to it; return the ids of the tokens that begin, end and pad, or None each."""
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is None:
        return ids
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    for name in TOKENIZER_COMPANIONS:
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, directory / name)
    settings_path, generation_path = directory / "tokenizer_config.json", directory / "generation_config.json"
    settings = DECODER_TOKENIZER | (files.read_json(settings_path) if settings_path.is_file() else {})
    files.write_json(settings_path, settings)
    if generation_path.is_file():
        generation = files.read_json(generation_path)
        return {key: generation.get(key) for key in ids}
    vocabulary = tokenizers.Tokenizer.from_file(str(tokenizer))
    for key in ids:
        token = settings.get(key.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        ids[key] = None if token is None else vocabulary.token_to_id(token)
    files.write_json(generation_path, {key: value for key, value in ids.items() if value is not None})
    return ids
