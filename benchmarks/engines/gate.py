"""The gate between an engine's process and the one that measures: a line in asks for something, a line out tells of it.

`step` asks for a step, `save DIR` for the student in Hugging Face's layout.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """What every engine is given.

    Attributes:
        home: the directory with `teacher` and `student`.
        batches_NBT: tokens of one batch after the other; after the last comes the first again.
        dtype: of the computation.
        learning_rate: of AdamW, constant.
        b2: of AdamW; b1 is 0.9, eps 1e-8, and there is no weight decay.
    """

    home: Path
    batches_NBT: np.ndarray
    dtype: str
    learning_rate: float
    b2: float

    def batches(self) -> Iterator[np.ndarray]:
        """Yield the tokens of each step, without end."""
        return itertools.cycle(self.batches_NBT)


def problem() -> Problem:
    """Return the problem in the directory that the command line names."""
    home = Path(sys.argv[1])
    said = json.loads((home / "problem.json").read_text("utf-8"))
    return Problem(home, np.load(home / "tokens.npy"), **said)


class Gate:
    """Lets a training loop take its steps one by one, and times each.

    What else the process prints goes to stderr. Where nobody asks any more, the process ends.

    Attributes:
        save: writes the student into a directory.
    """

    save: Callable[[str], Any]

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
        self._tell(self._next)
        while (asked := sys.stdin.readline().rstrip("\n")) != "step":
            if not asked:
                os._exit(0)
            self.save(directory := asked.removeprefix("save "))
            self._tell({"saved": directory})
        self._next, self._began = {}, time.perf_counter()

    def _tell(self, said: dict[str, Any]) -> None:
        print(json.dumps(said), file=self._out, flush=True)


def cuda_peak(torch: Any) -> dict[str, int]:
    """Return the most bytes that torch held on a GPU; nothing without one."""
    return {"device_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def jax_peak(jax: Any) -> dict[str, int]:
    """Return the most bytes that jax held on its first device, where that says it."""
    said: Sequence[Any] = [device.memory_stats() for device in jax.local_devices()[:1]]
    return {"device_bytes": said[0]["peak_bytes_in_use"]} if said[0] else {}
