"""Real English text that every Python carries: its manual's topics and the docstrings of its standard library.

Modules are read with `ast`, never imported, so that the same Python version gives the same documents anywhere.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "lib-dynload"}
_SKIPPED |= {"__pycache__", "encodings", "pydoc_data"}
"""Directories without the library's own prose; the topics in pydoc_data are taken from their module."""

KINDS = ("topic", "module", "class", "function")
"""What a document is of."""

_WORDS = {"document": 72, "prompt": 4, "answer": 20}
"""Words of each part of a passage."""

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BODIES = (*_DOCUMENTED, ast.If, ast.Try, ast.With, ast.ExceptHandler)


@functools.cache
def documents() -> tuple[dict[str, Any], ...]:
    """Return all documents as `id`, `text` and `label` (which of `KINDS`), sorted by id, no text twice."""
    from pydoc_data.topics import topics

    found = [(f"topics.{name}", text.strip(), "topic") for name, text in topics.items()]
    root = Path(sysconfig.get_path("stdlib"))
    with _without_collector():
        for path in _modules(root):
            found += _docstrings(path, ".".join(path.relative_to(root).with_suffix("").parts))
    unique: dict[str, tuple[str, str]] = {}
    for name, text, kind in sorted(found):
        unique.setdefault(text, (name, kind))
    rows = ({"id": name, "text": text, "label": KINDS.index(kind)} for text, (name, kind) in unique.items() if text)
    return tuple(rows)


@functools.cache
def questions() -> tuple[dict[str, Any], ...]:
    """Return a question about each public function that a module defines (a package's own `__init__` is left out).

    Each has `id`, `module`, `prompt`, and the start of the docstring as `answer`.
    """
    rows = ((row["id"], row["text"]) for row in documents() if row["label"] == KINDS.index("function"))
    public = {name: text for name, text in rows if not any(part.startswith("_") for part in name.split("."))}
    return tuple(
        {
            "id": name,
            "module": name.partition(".")[0],
            "prompt": f"What does {name} do?",
            "answer": " ".join(text.partition("\n\n")[0].split()),
        }
        for name, text in public.items()
    )


@functools.cache
def passages() -> tuple[dict[str, Any], ...]:
    """Return all documents cut into passages of `_WORDS` words in a row; what is left at an end is left out.

    Each has `id`, `module`, and three stretches of text, each with the white space before it: `document`, `prompt`, the
    few words that come next, and `answer`, how it goes on after them.
    """
    found = []
    for row in documents():
        words = re.findall(r"\s*\S+", row["text"])
        for number in range(len(words) // sum(_WORDS.values())):
            at, parts = number * sum(_WORDS.values()), {}
            for name, count in _WORDS.items():
                parts[name] = "".join(words[at : at + count])
                at += count
            found.append({"id": f"{row['id']}#{number}", "module": row["id"].partition(".")[0]} | parts)
    return tuple(found)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector: syntax trees are many small objects, and it would take half of all the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _modules(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - _SKIPPED)
        paths = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
        yield from (path for path in paths if path.is_file())


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        try:
            return _of_node(ast.parse(path.read_bytes()), module)
        except SyntaxError:  # put there by a distributor, for another version
            return iter(())


def _of_node(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield name, text, KINDS[1] if isinstance(node, ast.Module) else KINDS[2 + (not isinstance(node, ast.ClassDef))]
    for part in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, part, ()):
            if isinstance(child, _BODIES):
                inner = f"{name}.{child.name}" if isinstance(child, _DOCUMENTED[1:]) else name
                yield from _of_node(child, inner)
