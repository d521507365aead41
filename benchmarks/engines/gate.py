"""The gate between an engine's process and the one that measures: a line in asks for a step, a line out tells of it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """What every engine is given.

    Attributes:
        home: the directory with `teacher` and `student`.
        tokens_BT: one batch, which every step has.
        dtype: of the computation.
        learning_rate: of AdamW, constant.
        b2: of AdamW; b1 is 0.9, eps 1e-8, and there is no weight decay.
    """

    home: Path
    tokens_BT: np.ndarray
    dtype: str
    learning_rate: float
    b2: float


def problem() -> Problem:
    """Return the problem in the directory that the command line names."""
    home = Path(sys.argv[1])
    said = json.loads((home / "problem.json").read_text("utf-8"))
    return Problem(home, np.load(home / "tokens.npy"), **said)


class Gate:
    """Lets a training loop take its steps one by one, and times each.

    What else the process prints goes to stderr. Where nobody asks any more, the process ends.
    """

    def __init__(self, *packages: str) -> None:
        """Take the packages whose versions are told before the first step."""
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._next: dict[str, Any] = {"versions": {name: version(name) for name in packages}}
        self._began: float | None = None

    def turn(self, **facts: Any) -> None:
        """Tell of the step before this call, and return when the next one is wanted."""
        self._next |= facts
        if self._began is not None:
            self._next["seconds"] = time.perf_counter() - self._began
        print(json.dumps(self._next), file=self._out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self._next, self._began = {}, time.perf_counter()


def cuda_peak(torch: Any) -> dict[str, int]:
    """Return the most bytes that torch held on a GPU; nothing without one."""
    return {"device_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def jax_peak(jax: Any) -> dict[str, int]:
    """Return the most bytes that jax held on its first device, where that says it."""
    said: Sequence[Any] = [device.memory_stats() for device in jax.local_devices()[:1]]
    return {"device_bytes": said[0]["peak_bytes_in_use"]} if said[0] else {}
