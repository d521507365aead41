"""Work done ahead: one background thread that stays a few items in front of whoever consumes them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

_END = object()


def ahead(items: Generator[T, None, None], size: int) -> Generator[T, None, None]:
    """Yield the items, made by a thread that stays up to `size` ahead; closing this closes `items` and the thread.

    Raises:
        Exception: what making an item raised, where that item would have come.
    """
    ready: queue.Queue = queue.Queue(size)
    stopped = threading.Event()

    def put(value: object) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(value, timeout=0.1)
                return True
        return False

    def work() -> None:
        with contextlib.closing(items):
            try:
                for item in items:
                    if not put((item, None)):
                        return
                put((_END, None))
            except BaseException as error:  # the consumer raises it
                put((_END, error))

    thread = threading.Thread(target=work, name="kdjax-data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
