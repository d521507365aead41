"""From what a user calls a model to its ModelFile: a directory, a run, a GGUF file, a known name or a hub id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dacite
import jax
import numpy as np

from kdjax.errors import UserError, did_you_mean
from kdjax.models import files
from kdjax.models.adapter import ADAPTER, BASE, tensors_of
from kdjax.models.config import GIST, SOFT_PROMPT, ModelConfig, ModelSpec
from kdjax.models.convert import open_directory
from kdjax.models.lora import merged
from kdjax.models.model_file import ModelFile, lazy, select_kept
from kdjax.models.paths import parameter_paths
from kdjax.models.soft_prompt import check_fits
from kdjax.models.transformer import Model, bare


def open_model(source: str) -> ModelFile:
    """Return the model that `source` names; weights are read later, part by part.

    Args:
        source: a Hugging Face directory, PEFT's of a soft prompt, a run directory, a .gguf file, a known name, or a
            hub id.

    Raises:
        UserError: there is no such model, or it is damaged or of an unknown kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        kinds = {"model.json": _open_run, ADAPTER: _open_adapter}
        file = next((kinds[name] for name in kinds if (path / name).is_file()), open_directory)(path)
    else:
        file = open_directory(_fetched(source, path))
    return replace(file, source=source)


def _fetched(source: str, path: Path) -> Path:
    """Return the directory, in the cache, of a model that is not a local directory."""
    from kdjax.models import fetch

    if path.suffix == ".gguf":
        return fetch.cached_gguf(path)
    if path.is_file():
        kind = (
            "weights are pickled, which can run code, so they are never read"
            if path.suffix in files.PICKLED
            else "file"
        )
        raise UserError(f"{source} is a file ({kind}); wanted a directory with config.json and model.safetensors")
    directory = fetch.ensure(source)
    if directory is None:
        raise UserError(
            f"no model {source!r}: no such directory or .gguf file, no hub id (org/name), "
            f"and no known name{did_you_mean(source, fetch.KNOWN)}"
        )
    return directory


def _open_run(directory: Path) -> ModelFile:
    """Return the student of a run: its best saved step, or the newest whole one."""
    from kdjax.checkpoint import open_params

    path = directory / "model.json"
    try:
        config = dacite.from_dict(ModelConfig, files.read_json(path), dacite.Config(strict=True, cast=[tuple]))
    except dacite.DaciteError as error:
        raise UserError(f"{path} is not a model's architecture: {error}") from error
    params = jax.tree.map(np.asarray, open_params(directory).params)
    tokenizer = directory / "tokenizer.json"
    found = tokenizer if tokenizer.is_file() else None
    if (directory / BASE).is_file():
        return _with_gist(replace(_on_base(directory, params), tokenizer=found), params)
    _check_fits(directory, config, bare(params))
    return _with_gist(ModelFile(config, jax.tree.map(lazy, bare(params)), str(directory), found), params)


def _with_gist(file: ModelFile, params: dict[str, Any]) -> ModelFile:
    """Return a model with the gist that a run has trained, or as it is where there is none."""
    if GIST not in params:
        return file
    gist = jax.tree.map(lazy, params[GIST])
    width = file.config.width
    if set(gist) != {"embedding"} or gist["embedding"].shape[1:] != (width,):
        shapes = {name: leaf.shape for name, leaf in gist.items()}
        raise UserError(
            f"the gist of {file.source} has shapes {shapes}; wanted an embedding as wide as the model, {width}"
        )
    return replace(file, tensors=file.tensors | {GIST: gist})


def _on_base(directory: Path, params: dict[str, Any]) -> ModelFile:
    """Return the model of a run that has trained a part of another, adapters to it or a soft prompt before it."""
    base, spec = _base(directory)
    own = jax.tree.map(lazy, params.get(SOFT_PROMPT, {}))
    return _behind(directory, merged(base, bare(params), spec.lora), spec, own)


def _base(directory: Path) -> tuple[ModelFile, ModelSpec]:
    """Return the model that base.json names, and what it says of it.

    Raises:
        UserError: that model is not there any more, or has changed.
    """
    record = files.read_json(directory / BASE)
    try:
        spec = dacite.from_dict(ModelSpec, record["spec"], dacite.Config(strict=True, cast=[tuple]))
    except (dacite.DaciteError, KeyError, TypeError) as error:
        raise UserError(f"{directory / BASE} does not say what the run was trained on: {error!r}") from error
    try:
        base = select_kept(open_model(spec.source), spec)
    except UserError as error:
        raise UserError(f"{directory} has trained a part of {spec.source}, which is wanted too: {error}") from error
    if base.sha256() != record.get("sha256"):
        raise UserError(
            f"{directory} has trained a part of {spec.source}, whose weights have changed since; restore them"
        )
    return base, spec


def _open_adapter(directory: Path) -> ModelFile:
    """Return a soft prompt of PEFT's with its base: that of base.json, or the one adapter_config.json names.

    Raises:
        UserError: the base cannot be opened, or the adapter is none that is read here.
    """
    if (directory / BASE).is_file():
        base, spec = _base(directory)
    else:
        spec = ModelSpec(source=str(files.read_json(directory / ADAPTER).get("base_model_name_or_path")))
        try:
            base = open_model(spec.source)
        except UserError as error:
            raise UserError(
                f"{directory} is an adapter of {spec.source}, which is wanted too: {error}; or put its directory into "
                f"base_model_name_or_path of its {ADAPTER}"
            ) from error
    return _behind(directory, base, spec, tensors_of(directory, base.config))


def _behind(directory: Path, base: ModelFile, spec: ModelSpec, own: dict[str, Any]) -> ModelFile:
    """Return a model behind a soft prompt, or as it is where there is none."""
    if not own:
        return base
    base.check_plain()
    check_fits(own, base.config, str(directory))
    return replace(base, tensors=base.tensors | {SOFT_PROMPT: own}, base=spec)


def _check_fits(directory: Path, config: ModelConfig, params: dict[str, Any]) -> None:
    wanted = parameter_paths(jax.eval_shape(Model(config).init, jax.random.key(0)))
    found = parameter_paths(params)
    for path in sorted(wanted.keys() | found.keys()):
        shapes = [tree[path].shape if path in tree else None for tree in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{directory}: the saved step has {path} of shape {shapes[0]}, but model.json says {shapes[1]}"
            )
