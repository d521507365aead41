"""What chips can do, by their makers' pages, and machines made of them by name: `v5e:16x16`, `gpu:8xH100`, `cpu:8`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdjax.errors import UserError, did_you_mean

TB, TFLOPS = 1e12, 1e12


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        kind: what jax calls such devices.
        memory: bytes; 0 is not known.
        bfloat16: FLOP/s of matmuls; 0 is not known.
        float32: the same as JAX computes float32 by default: in one bfloat16 pass on a TPU, in TF32 on these GPUs.
        memory_rate: bytes/s to and from its memory.
        network: bytes/s that it can send to other chips, over all links and one way.
        dimensions: how many sizes a topology has.
        devices: that jax sees a chip as.
        target: libtpu's name, or the file beside this one that describes a GPU to XLA.
        config: libtpu's name of how a chip is run, where it must be told: v4's two cores as one device.
    """

    kind: Literal["cpu", "gpu", "tpu"]
    memory: float
    bfloat16: float
    float32: float
    memory_rate: float
    network: float
    dimensions: int = 1
    devices: int = 1
    target: str = ""
    config: str = ""


# Columns: memory; bfloat16, float32; memory_rate; network, which is half of what makers give for both ways.
CHIPS = {
    # https://docs.cloud.google.com/tpu/docs/v4
    "v4": Chip("tpu", 32 * 2**30, 275 * TFLOPS, 275 * TFLOPS, 1.2 * TB, 0.3 * TB, 3, 1, "v4", "megacore"),
    # https://docs.cloud.google.com/tpu/docs/v5e
    "v5e": Chip("tpu", 16 * 2**30, 197 * TFLOPS, 197 * TFLOPS, 0.819 * TB, 0.2 * TB, 2, 1, "v5e"),
    # https://docs.cloud.google.com/tpu/docs/v5p
    "v5p": Chip("tpu", 95 * 2**30, 459 * TFLOPS, 459 * TFLOPS, 2.765 * TB, 0.6 * TB, 3, 1, "v5p"),
    # https://docs.cloud.google.com/tpu/docs/v6e
    "v6e": Chip("tpu", 32 * 2**30, 918 * TFLOPS, 918 * TFLOPS, 1.638 * TB, 0.4 * TB, 2, 1, "v6e"),
    # https://docs.cloud.google.com/tpu/docs/tpu7x; each of its two cores is a device with half of everything
    "v7x": Chip("tpu", 192 * 2**30, 2307 * TFLOPS, 2307 * TFLOPS, 7.38 * TB, 0.6 * TB, 3, 2, "tpu7x"),
    # https://www.nvidia.com/en-us/data-center/h100/ (SXM, dense)
    "H100": Chip("gpu", 80e9, 989.4 * TFLOPS, 494.7 * TFLOPS, 3.35 * TB, 0.45 * TB, target="h100.txtpb"),
    # https://www.nvidia.com/en-us/data-center/h200/ (SXM, dense)
    "H200": Chip("gpu", 141e9, 989.4 * TFLOPS, 494.7 * TFLOPS, 4.8 * TB, 0.45 * TB, target="h200.txtpb"),
    # No maker's page speaks for all: memory and collectives are planned, time is not.
    "cpu": Chip("cpu", 0, 0, 0, 0, 0),
}
"""One row a chip."""

NODE = 8
"""GPUs that NVLink joins; between nodes the network is another, which is not planned."""


@dataclass(frozen=True)
class Machine:
    """So many chips of one kind.

    Attributes:
        name: as it was given.
        model: the row of `CHIPS`.
        sizes: of the topology.
    """

    name: str
    model: str
    sizes: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What one of its chips can do."""
        return CHIPS[self.model]

    @property
    def chips(self) -> int:
        """How many it has."""
        return math.prod(self.sizes)

    @property
    def device_count(self) -> int:
        """How many devices jax sees."""
        return self.chips * self.chip.devices


def machine(name: str) -> Machine:
    """Return the machine of a name.

    Raises:
        UserError: no such chip, or sizes that it does not come in.
    """
    model, _, rest = name.partition(":")
    if model == "gpu":
        count, _, model = rest.partition("x")
        rest = count
    known = [key for key, chip in CHIPS.items() if chip.kind != "gpu" or name.startswith("gpu")]
    if model not in CHIPS or (name.startswith("gpu")) != (CHIPS[model].kind == "gpu"):
        wanted = "v5e:16x16, gpu:8xH100 or cpu:8, for example"
        raise UserError(
            f"--topology {name!r} names no chip that is known{did_you_mean(model, known)} (wanted {wanted})"
        )
    chip = CHIPS[model]
    sizes = tuple(int(size) for size in rest.split("x")) if re.fullmatch(r"\d+(x\d+)*", rest) else ()
    if len(sizes) != chip.dimensions or min(sizes) < 1:
        like = {1: "8", 2: "16x16", 3: "4x4x8"}[chip.dimensions]
        example = f"gpu:{like}x{model}" if chip.kind == "gpu" else f"{model}:{like}"
        raise UserError(f"--topology {name!r}: wanted {chip.dimensions} whole numbers from 1, as in {example}")
    if chip.kind == "gpu" and math.prod(sizes) > NODE:
        raise UserError(f"--topology {name!r}: wanted at most {NODE} GPUs, one node; more are not planned")
    return Machine(name, model, sizes)


def devices_of(wanted: Machine) -> Sequence[Any]:
    """Return the devices of a machine that is not here, or forced CPU devices, for a compiler to compile for.

    Raises:
        UserError: no compiler for it is installed, or it does not come in this topology.
    """
    import jax
    from jax.experimental import topologies

    chip = wanted.chip
    try:
        if chip.kind == "cpu":
            return jax.devices("cpu")[: wanted.device_count]
        if chip.kind == "tpu":
            name = f"{chip.target}:{'x'.join(map(str, wanted.sizes))}"
            few = {"chips_per_host_bounds": (*wanted.sizes, 1, 1)[:3]} if wanted.chips < 4 else {}
            options = few | ({"chip_config_name": chip.config} if chip.config else {})
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        else:
            text = (Path(__file__).parent / chip.target).read_text("utf-8")
            count = f"1x1x{wanted.chips}"
            found = topologies.get_topology_desc(platform="cuda", target_config=text, topology=count)
    except Exception as error:  # jaxlib's errors, and those of a plugin that is not there or does not load
        raise UserError(f"{wanted.name}: {str(error).splitlines()[0]}") from error
    return found.devices
