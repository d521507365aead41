"""The job of `kdjax plan`: asks a process of its own, so that what compilers want of the environment stays there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.plan.chips import machine

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # nothing here is computed on but the host
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask a cloud's metadata server for the TPU that it is on
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may plan, or train, at the same time
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the CUDA plugin would want a driver
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""Of the process that plans."""


def plan(config: Config, topology: str, price: float | None = None, sweep: int = 0) -> Any:
    """Return the plan of a config on a topology, or with `sweep` several, of which so many that fit are compiled.

    Raises:
        UserError: a machine or a config that cannot be.
    """
    machine(topology)  # what is wrong with a name is said before anything starts
    if price is not None and not price >= 0:
        raise UserError(f"--price is {price}; wanted dollars for a chip and an hour, at least 0")
    if sweep < 0:
        raise UserError(f"--sweep is {sweep}; wanted how many plans that fit to compile, at least 1")
    request = {"config": asdict(config), "topology": topology, "price": price, "sweep": sweep}
    flags = " ".join(
        part for part in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in part
    )
    done = subprocess.run(
        [sys.executable, "-m", "kdjax.plan"],
        input=json.dumps(request),
        env=os.environ | ENVIRONMENT | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode or not done.stdout:
        raise UserError(
            f"the process that plans for {topology} ended with exit code {done.returncode}; below 0 it was killed, for "
            "memory perhaps"
        )
    found = json.loads(done.stdout)
    if "error" in found:
        raise UserError(found["error"])
    return found
