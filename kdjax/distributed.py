"""One job over several processes: how they find each other, and that all of them are there."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import jax

from kdjax.errors import UserError

PATIENCE = 60
"""Seconds that jax waits longer than we do: when its own time is up it ends the process without a word that helps."""


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        coordinator: HOST:PORT of process 0, or empty.
        processes: how many there are; 0 where nobody says.
        process: which one this is; -1 where nobody says.
        auto: all three are read from the launcher's environment (Slurm, Kubernetes, Cloud TPU, Open MPI).
        timeout: seconds to wait for the others.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1
    auto: bool = False
    timeout: int = 300

    def __post_init__(self) -> None:
        given = f"coordinator {self.coordinator!r}, processes {self.processes}, process {self.process}"
        if self.auto and (self.coordinator or self.process >= 0):
            raise UserError(
                f"--distributed.auto finds these out by itself, but got {given}; leave out one or the other"
            )
        if not self.auto and (self.coordinator or self.process >= 0):
            host, _, port = self.coordinator.rpartition(":")
            if not (host and port.isdecimal() and 0 <= self.process < self.processes):
                raise UserError(
                    f"--distributed has {given}; wanted HOST:PORT of process 0, how many processes there are, and "
                    "which one this is, from 0"
                )
        if self.timeout < 1 or self.processes < 0:
            raise UserError(
                f"--distributed.timeout is {self.timeout} and --distributed.processes {self.processes}; wanted at "
                "least 1 second, and as many processes as there are"
            )


def join(launch: Launch) -> None:
    """Join the job's other processes, and check that there are as many as was said.

    Who has joined already (a launcher that calls jax.distributed.initialize, as Ray does) is only counted.

    Raises:
        UserError: nobody answers in time, no launcher is known, or the processes are not one job.
    """
    if (launch.coordinator or launch.auto) and not jax.distributed.is_initialized():
        _connect(launch)
    if launch.processes and jax.process_count() != launch.processes:
        raise UserError(
            f"--distributed.processes is {launch.processes}, but this job has {jax.process_count()}: each would train "
            "alone; start all of them with --distributed.auto under a launcher that jax knows, or with "
            "--distributed.coordinator and --distributed.process"
        )


def _connect(launch: Launch) -> None:
    """Connect in a thread, since what waits in jax can be neither interrupted nor caught."""
    failed: list[Exception] = []
    how: dict[str, Any] = {"initialization_timeout": launch.timeout + PATIENCE}
    if not launch.auto:  # otherwise Slurm's environment would leave each process one device
        how |= {"cluster_detection_method": "deactivate", "coordinator_address": launch.coordinator}
        how |= {"num_processes": launch.processes, "process_id": launch.process}

    def connect() -> None:
        try:
            jax.distributed.initialize(**how)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(launch.timeout)
    if thread.is_alive():
        where = launch.coordinator or "the address that the launcher gives"
        missing = "not all processes came" if launch.process == 0 else f"no coordinator answered at {where}"
        raise UserError(
            f"{missing} within {launch.timeout} s; look at whether process 0 runs and this address reaches it, or "
            "raise --distributed.timeout"
        )
    if failed and launch.auto:
        raise UserError(
            f"--distributed.auto knows no launcher here ({failed[0]}); give --distributed.coordinator, "
            "--distributed.processes and --distributed.process"
        )
    if failed:
        raise UserError(f"this process could not join at {launch.coordinator}: {failed[0]}")
