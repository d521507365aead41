"""Real English text that every Python carries: its manual's topics and the docstrings of its standard library.

Modules are read with `ast`, never imported, so that the same Python version gives the same documents anywhere.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "lib-dynload"}
_SKIPPED |= {"__pycache__", "encodings", "pydoc_data"}
"""Directories without the library's own prose; the topics in pydoc_data are taken from their module."""

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BODIES = (*_DOCUMENTED, ast.If, ast.Try, ast.With, ast.ExceptHandler)


@functools.cache
def documents() -> tuple[dict[str, str], ...]:
    """Return all documents as `id` and `text`, sorted by id; a text that occurs twice is kept once."""
    from pydoc_data.topics import topics

    found = [(f"topics.{name}", text.strip()) for name, text in topics.items()]
    root = Path(sysconfig.get_path("stdlib"))
    with _without_collector():
        for path in _modules(root):
            found += _docstrings(path, ".".join(path.relative_to(root).with_suffix("").parts))
    unique: dict[str, str] = {}
    for name, text in sorted(found):
        unique.setdefault(text, name)
    return tuple({"id": name, "text": text} for text, name in unique.items() if text)


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


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        try:
            return _of_node(ast.parse(path.read_bytes()), module)
        except SyntaxError:  # put there by a distributor, for another version
            return iter(())


def _of_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield name, text
    for part in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, part, ()):
            if isinstance(child, _BODIES):
                inner = f"{name}.{child.name}" if isinstance(child, _DOCUMENTED[1:]) else name
                yield from _of_node(child, inner)
