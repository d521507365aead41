"""On what a run or a measurement is made: the kind of device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path

import jax

import kdjax

_compiled_for: ContextVar[str] = ContextVar("compiled_for", default="")


def backend() -> str:
    """Return the kind of device that is computed on, as jax names it, or that is compiled for and is not here."""
    return _compiled_for.get() or jax.default_backend()


@contextmanager
def compiling_for(kind: str) -> Iterator[None]:
    """Let `backend` name a kind of device that is not here."""
    before = _compiled_for.set(kind)
    try:
        yield
    finally:
        _compiled_for.reset(before)


def describe() -> dict[str, str | int]:
    """Return device, counts, versions, and the commit of the sources where git knows it."""
    device = jax.devices()[0]
    found = {
        "device": platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "python": platform.python_version(),
        "kdjax": kdjax.__version__,
        **{name: version(name) for name in ("jax", "flax", "optax")},
    }
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def _commit() -> str:
    """Return the commit of a source checkout, with ``+`` where it has uncommitted changes; empty elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for args in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return said[0].strip() + ("+" if said[1].strip() else "")
