"""How a run learns that it is to stop: by a signal to this process, or to any process of its job."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextmanager
def asked_to_stop(step: Callable[[], int]) -> Iterator[Callable[[], int]]:
    """Yield a function that says which of SIGTERM and SIGINT has come, 0 for none; a second one ends the process.

    Args:
        step: returns how far the run is; the processes of one job stop at the same one.
    """
    if jax.process_count() > 1:  # jax tells all of a SIGTERM that one of them got
        yield lambda: signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step())
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    got: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        got.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: got[0] if got else 0
    finally:
        restore()
