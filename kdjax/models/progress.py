"""Shows how far a download is, by watching its files grow: whoever downloads need not know."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich import progress as bars
from rich.console import Console

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


def say(text: str, show: bool) -> None:
    """Print a line for the person waiting, on standard error so that results stay alone on standard output."""
    if show:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def watched(directory: Path, pattern: str, total: int, label: str, show: bool) -> Iterator[None]:
    """Show bytes, rate and time left of the files in `directory` that match, while the block runs."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(directory, pattern, total, label, done), daemon=True)
    if show:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if show:
            thread.join()


def _watch(directory: Path, pattern: str, total: int, label: str, done: threading.Event) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        start = time.monotonic()
        while not done.wait(LINE_SECONDS):
            print(line(label, _bytes(directory, pattern), total, time.monotonic() - start), file=sys.stderr, flush=True)
        return
    columns = (bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(bars.TextColumn("{task.description}"), bars.BarColumn(), *columns, console=console) as bar:
        task = bar.add_task(label, total=total)
        while not done.wait(0.2):
            bar.update(task, completed=min(_bytes(directory, pattern), total))


def line(label: str, got: int, total: int, seconds: float) -> str:
    """Return one plain line: ``NAME: 12.0 of 93.0 MB, 1.2 MB/s, 68 s left``."""
    got = min(got, total)
    if got == 0:
        return f"{label}: waiting for the first byte since {seconds:.0f} s"
    rate = got / seconds
    return f"{label}: {got / 1e6:.1f} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {(total - got) / rate:.0f} s left"


def _bytes(directory: Path, pattern: str) -> int:
    total = 0
    for file in directory.rglob(pattern):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total
