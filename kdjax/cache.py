"""The directory that kdjax keeps things in between commands: fetched models, and what jax has compiled."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """Return the directory: KDJAX_CACHE, or the user's cache directory."""
    if chosen := os.environ.get("KDJAX_CACHE"):
        return Path(chosen).expanduser()
    usual = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(usual).expanduser() / "kdjax"


def keep_compiled() -> None:
    """Let jax, once it is imported, keep what it compiles, unless JAX_COMPILATION_CACHE_DIR says where."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory() / "compiled"))
