"""One job at a time in a run directory: two that log and save into the same one would mix their runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from kdjax.errors import UserError


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Keep `run_dir`, which must exist, for this job alone; the system frees it however the process ends.

    Raises:
        UserError: another process has it.
    """
    if jax.process_index() != 0:
        yield
        return
    with (Path(run_dir) / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise UserError(
                f"{run_dir} is in use by process {holder}; stop it or choose another run directory"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
