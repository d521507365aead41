"""The process that plans: a request as JSON on standard input, its answer as JSON on standard output."""

from __future__ import annotations

import json
import os
import sys

import jax

from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.fields import from_json
from kdjax.plan.chips import machine
from kdjax.plan.measure import measure, sweep


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    answer, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w", buffering=1)
    for descriptor in (1, 2):  # compilers print there what only their developers want
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    wanted = machine(request["topology"])
    jax.config.update("jax_num_cpu_devices", wanted.device_count)
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for no device cannot be read back
    config = from_json(json.dumps(request["config"]), Config)
    try:
        if request["sweep"]:
            found = sweep(config, wanted, request["price"], request["sweep"])
        else:
            found = measure(config, wanted, request["price"])
    except UserError as error:
        found = {"error": str(error)}
    except jax.errors.JaxRuntimeError as error:
        found = {"error": f"the compiler for {wanted.name} failed: {str(error).splitlines()[0]}"}
    json.dump(found, answer)
    answer.close()


if __name__ == "__main__":
    main()
