"""Smaller vocabularies: a byte-pair tokenizer with only some of its tokens, which still encodes whatever it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kdjax.data.tokenizers import load_tokenizer
from kdjax.errors import UserError

Tree = dict[str, Any]
"""An object of a JSON file."""

COPIED = ("special_tokens_map.json", "chat_template.jinja")
"""What may lie beside a tokenizer.json and names tokens by their text alone."""


def trim_tokenizer(path: Path, counts: Mapping[int, int], size: int, out: Path) -> list[int]:
    """Return the old ids, in the order of the new ones, of a tokenizer written to the directory `out`.

    Args:
        path: a tokenizer.json; what belongs to it and lies beside it is written too, with the new ids.
        counts: how often each token occurs in text; see `trimmed`.
        size: tokens to keep.
        out: an existing directory.

    Raises:
        UserError: see `trimmed`.
    """
    tree, old_ids = trimmed(_read(path), counts, size)
    new_of = {old: new for new, old in enumerate(old_ids)}
    settings = _read(path.parent / "tokenizer_config.json") | {"eos_token": load_tokenizer(path).eos_token}
    if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {str(new_of[int(old)]): token for old, token in decoder.items()}
    generation = _read(path.parent / "generation_config.json")
    generation = {key: _moved(key, value, new_of) for key, value in generation.items()}
    found = {"tokenizer.json": tree, "tokenizer_config.json": settings, "generation_config.json": generation}
    for name, value in found.items():
        if value:
            (out / name).write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    for name in COPIED:
        if (path.parent / name).is_file():
            shutil.copyfile(path.parent / name, out / name)
    return old_ids


def _read(path: Path) -> Tree:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _moved(key: str, value: Any, new_of: Mapping[int, int]) -> Any:
    """Return a setting of a generation_config.json with new ids."""
    if not key.endswith("_token_id"):
        return value
    return [new_of[old] for old in value] if isinstance(value, list) else new_of.get(value)


def trimmed(tree: Tree, counts: Mapping[int, int], size: int) -> tuple[Tree, list[int]]:
    """Return a tokenizer.json with `size` of its tokens, and their old ids in the order of the new ones.

    Special tokens and those that no merge makes (single bytes or letters, so that any text still encodes) are kept;
    then, as long as there is room, the tokens that occur most, each with the tokens that it is merged from; of those
    that occur equally often the first. A text that was encoded to kept tokens alone is encoded to the same ones: all
    the merges that made them are there in their old order, and no new ones. (This holds where every token is made by
    one merge, as in a trained byte-level vocabulary; of several the first is followed.)

    Raises:
        UserError: the tokenizer is no byte-pair encoding, or `size` is too small for what is always kept.
    """
    model = tree.get("model", {})
    if "merges" not in model:
        raise UserError(f"vocab cuts byte-pair tokenizers; this one is {model.get('type')}: leave --vocab out")
    merges = _merges(model)
    added = {token["content"]: token["id"] for token in tree.get("added_tokens") or ()}
    old_of = model["vocab"] | added
    kept = _kept(old_of, added, dict(reversed(merges)), counts, size)
    order = sorted(kept, key=old_of.__getitem__)
    new_of = {token: new for new, token in enumerate(order)}
    smaller = {
        "vocab": {token: new for token, new in new_of.items() if token in model["vocab"]},
        "merges": [list(pair) for token, pair in merges if {token, *pair} <= kept],
    }
    return _renumbered(tree, new_of) | {"model": model | smaller}, [old_of[token] for token in order]


def _merges(model: Tree) -> list[tuple[str, tuple[str, str]]]:
    """Return, in order, what each merge makes, and of which two tokens."""
    prefix, found = model.get("continuing_subword_prefix") or "", []
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        found.append((left + right.removeprefix(prefix), (left, right)))
    return found


def _kept(
    old_of: Mapping[str, int],
    added: Collection[str],
    made: Mapping[str, tuple[str, str]],
    counts: Mapping[int, int],
    size: int,
) -> set[str]:
    """Return the tokens to keep; `made` says of which two a merge makes a token."""
    kept = {token for token in old_of if token in added or token not in made}
    if len(kept) > size:
        raise UserError(f"vocab is {size}; wanted at least {len(kept)}: the single bytes or letters and special tokens")
    for token in sorted(old_of, key=lambda token: (-counts.get(old_of[token], 0), old_of[token])):
        more = _with_parts(token, made, kept)
        if len(kept) + len(more) <= size:
            kept |= more
    return kept


def _with_parts(token: str, made: Mapping[str, tuple[str, str]], kept: set[str]) -> set[str]:
    """Return a token and all that it is merged from, less what is kept already."""
    more, todo = set(), [token]
    while todo:
        if (now := todo.pop()) not in kept and now not in more:
            more.add(now)
            todo += made[now]
    return more


def _renumbered(tree: Tree, new_of: Mapping[str, int]) -> Tree:
    """Return the parts of a tokenizer.json that name special tokens by id, with new ids."""
    added = [token | {"id": new_of[token["content"]]} for token in tree.get("added_tokens") or ()]
    found = tree | {"added_tokens": added, "post_processor": _processor(tree.get("post_processor"), new_of)}
    if tree.get("padding"):
        found["padding"] = tree["padding"] | {"pad_id": new_of[tree["padding"]["pad_token"]]}
    return found


def _processor(node: Tree | None, new_of: Mapping[str, int]) -> Tree | None:
    """Return what puts special tokens around a text: a template, the pair `sep` and `cls`, or a sequence of such."""
    if node is None:
        return None
    found: Tree = {key: [node[key][0], new_of[node[key][0]]] for key in ("sep", "cls") if key in node}
    if "processors" in node:
        found["processors"] = [_processor(inner, new_of) for inner in node["processors"]]
    if "special_tokens" in node:
        special = node["special_tokens"].items()
        ids = {name: {"ids": [new_of[part] for part in token["tokens"]]} for name, token in special}
        found["special_tokens"] = {name: token | ids[name] for name, token in special}
    return node | found
