"""One plan: the step compiled for a machine that need not be here, and what is told from it. In its own process."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import jax

from kdjax.config import Config
from kdjax.environment import compiling_for
from kdjax.errors import UserError
from kdjax.job import Job
from kdjax.plan.abstract import abstract_batch, abstract_frozen, abstract_job
from kdjax.plan.advice import advice
from kdjax.plan.chips import Machine, devices_of
from kdjax.plan.estimate import (
    bounds,
    estimate,
    moved_bytes,
    sizes_of,
    teacher_moves,
    teachers_work,
    work_bytes,
)
from kdjax.plan.flops import Flops, step_flops
from kdjax.plan.hlo import Collective, collectives
from kdjax.sharding import ON_HOST, Placement

COMPILERS = {"cpu": "jaxlib", "tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
"""Kind of chip -> the module whose presence says that it can be compiled for."""

Plan = dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What a compiler says of a step.

    Attributes:
        peak: bytes of a device at one time, arguments included; None where it says only that they do not fit.
        reserved: what it sets aside for that, gaps between arrays included.
        found: the collectives; None where it did not come that far.
        refused: what it said where the step does not fit.
    """

    peak: int | None
    reserved: int | None
    found: list[Collective] | None
    refused: str = ""


def measure(config: Config, machine: Machine, price: float | None = None, compiles: bool = True) -> Plan:
    """Return the plan of a config on a machine, as JSON.

    Raises:
        UserError: a config or a mesh that cannot be on so many devices.
    """
    kind = machine.chip.kind
    is_there = find_spec(COMPILERS[kind]) is not None
    with compiling_for(kind):
        devices = devices_of(machine) if compiles and is_there else jax.devices("cpu")[: machine.device_count]
        job = abstract_job(config, devices)
        takes = job.place.mesh.size == machine.device_count or kind != "tpu"
        compiled = _compiled(job, kind) if compiles and is_there and takes else None
        plan = told(job, machine, compiled, price)
    if compiles and not is_there:
        plan["notes"].append(
            f"no compiler for {machine.model} is installed (pip install 'kdjax[plan-{kind}]'): all of it is estimated"
        )
    if not takes:
        plan["notes"].append(
            "the compiler for TPUs takes all chips of a machine, not the student's and the teacher's apart: all of it "
            "is estimated"
        )
    return plan


def _compiled(job: Job, kind: str) -> list[Compiled]:
    """Compile the step as training does, and what a teacher apart runs, but for shapes in the place of arrays."""
    sizes = sizes_of(job, kind)
    lowered = job.lowered(job.abstract_state, abstract_frozen(job), abstract_batch(job))
    places = (job.place, job.teacher_place)[: len(lowered)]
    chunks = -(-sizes.tokens // sizes.chunk)
    return [_made(one, place, kind, chunks) for one, place in zip(lowered, places, strict=True)]


def _made(lowered: Any, place: Placement, kind: str, chunks: int) -> Compiled:
    """Compile what is lowered for a place; `chunks` is how often the loss's loop runs."""
    try:
        made = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMG])\b", str(error))
        peak = int(float(asked[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[asked[2]]) if asked else None
        return Compiled(peak, None, None, _first_line(str(error)))
    sizes: Any = made.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    reserved = held + sizes.temp_size_in_bytes
    peak = reserved if kind == "cpu" else sizes.peak_memory_in_bytes  # which on a CPU leaves out what is worked with
    if kind == "tpu":
        peak -= sizes.host_argument_size_in_bytes + sizes.host_temp_size_in_bytes  # a peak of all memories together
    found = collectives(made.as_text(), dict(place.mesh.shape), chunks)
    return Compiled(int(peak), int(reserved), found)


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if "used" in line.lower()), text.splitlines()[0])


def told(job: Job, machine: Machine, made: Sequence[Compiled] | None, price: float | None = None) -> Plan:
    """Return the plan of a job by what its compiler says, or by estimates where it was not compiled.

    Args:
        job: what is planned.
        machine: what it is planned for.
        made: the step, and what a teacher apart runs where there is one, compiled.
        price: dollars for a chip and an hour.
    """
    config, kind, compiled = job.config, machine.chip.kind, made[0] if made else None
    held, sizes = _held(job), sizes_of(job, kind)
    kept = sum(held[name] for name in held if name not in ("trained", "host"))
    estimated = kept + work_bytes(job, sizes, held["trained"])
    flops = step_flops(config, job.student.model.config, *(one.model.config for one in job.teachers.values()))
    found = None if compiled is None else compiled.found
    apart = _apart(job, machine, flops, made[-1] if made and len(made) > 1 else None) if job.apart else None
    times = estimate(
        job, machine, flops, moved_bytes(job, sizes, held), found, price, apart["seconds"] if apart else None
    )
    beside = apart["memory"]["teacher"] if apart and config.teacher_mesh.devices < 0 else 0
    plan: Plan = {
        "name": config.name,
        "topology": machine.name,
        "chips": machine.chips,
        "devices": machine.device_count,
        "by": "estimate" if compiled is None else "compiler",
        "mesh": dict(job.place.mesh.shape),
        "batch_size": config.batch_size,
        "microbatches": config.microbatches,
        "sequence_length": config.data.sequence_length,
        "remat": config.student.remat,
        "loss": config.objective.implementation,
        "chunk_tokens": sizes.chunk,
        "parameters": _parameters(job),
        "memory": {
            **{name: held[name] for name in ("teacher", "student", "optimizer", "host")},
            **_peak(machine, estimated, kept, compiled, beside),
        },
        "flops": asdict(flops) | {"done": flops.done},
        "collectives": None if found is None else [asdict(row) | {"sent": row.sent} for row in found],
        "apart": apart,
        "estimate": times,
        "price": price,
        "notes": _notes(job, compiled, sizes.is_flash, kind),
        "versions": {"jax": jax.__version__},
    }
    plan["advice"] = advice(job, plan, sizes) if plan["memory"]["fits"] is False else []
    return plan


def _apart(job: Job, machine: Machine, flops: Flops, compiled: Compiled | None) -> Plan:
    """Return what a plan says of a teacher on a mesh of its own."""
    teacher: Any = job.teacher
    sizes, chip = sizes_of(job, machine.chip.kind, job.teacher_place), machine.chip
    held = _bytes(abstract_frozen(job)["teacher"])
    found = None if compiled is None else compiled.found
    seconds: dict[str, float] = {}
    if chip.bfloat16:
        compute = flops.teacher / getattr(chip, teacher.spec.dtype) / (job.teacher_place.mesh.size / chip.devices)
        seconds = bounds(machine, compute, teacher_moves(job, teacher, sizes, held), found)
    beside = _bytes(job.abstract_state) if job.config.teacher_mesh.devices < 0 else 0
    estimated = held + teachers_work(teacher, sizes)
    return {
        "devices": job.teacher_place.mesh.size,
        "mesh": dict(job.teacher_place.mesh.shape),
        "memory": {"teacher": held, **_peak(machine, estimated, held, compiled, beside)},
        "collectives": None if found is None else [asdict(row) | {"sent": row.sent} for row in found],
        "seconds": seconds,
    }


def _peak(machine: Machine, estimated: float, kept: int, compiled: Compiled | None, beside: int) -> dict[str, Any]:
    """Return what a device needs at most, and whether it has it.

    Args:
        machine: whose device it is.
        estimated: bytes, where nothing was compiled.
        kept: bytes of it that are there through the step.
        compiled: what the compiler says.
        beside: bytes of the device that are not the compiled function's.
    """
    peak = estimated if compiled is None else compiled.peak
    reserved = None if compiled is None or compiled.reserved is None else compiled.reserved + beside
    limit = machine.chip.memory / machine.chip.devices
    work, peak = (None, None) if peak is None else (int(peak - kept), int(peak + beside))
    asked = reserved if machine.chip.kind == "gpu" and reserved else peak  # a TPU's compiler refuses by itself
    fits = None if not limit else bool(asked and asked <= limit and not (compiled and compiled.refused))
    return {
        "work": work,
        "peak": peak,
        "reserved": reserved,
        "peak_estimated": int(estimated + beside),
        "limit": int(limit),
        "fits": fits,
        "refused": compiled.refused if compiled else "",
    }


def _held(job: Job) -> dict[str, int]:
    """Return the bytes that a device holds through a step, by what they are."""
    state, frozen = job.abstract_state, abstract_frozen(job)
    trained = _bytes(state.params)
    held = {
        "teacher": _bytes(frozen.get("teacher_head", frozen.get("teacher", {}))),
        "student": trained + _bytes(frozen.get("student", {})),
        "optimizer": _bytes(state.opt_state),
        "host": _bytes(frozen.get("teacher", {}), on_host=True),
        "other": _bytes(state.slow) + _bytes(abstract_batch(job)),
    }
    return held | {"trained": trained}


def _bytes(tree: Any, on_host: bool = False) -> int:
    """Return the bytes of a device's parts in its own memory, or of those in its host's."""

    def of(x: Any) -> int:
        if (getattr(getattr(x, "sharding", None), "memory_kind", "") == ON_HOST) != on_host:
            return 0
        shape = x.shape if getattr(x, "sharding", None) is None else x.sharding.shard_shape(x.shape)
        bits = (
            jax.numpy.iinfo(x.dtype).bits if jax.numpy.issubdtype(x.dtype, jax.numpy.integer) else 8 * x.dtype.itemsize
        )
        return math.prod(shape) * bits // 8

    return sum(map(of, jax.tree.leaves(tree)))


def _parameters(job: Job) -> dict[str, int]:
    models = {"teacher": job.teacher, "student": job.student}
    return {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(named.model.init, jax.random.key(0))))
        for name, named in models.items()
        if named is not None
    }


def _notes(job: Job, compiled: Compiled | None, is_flash: bool, kind: str) -> list[str]:
    """Return what a reader should know of this plan beyond its figures."""
    said = {
        "attention is XLA's own, which keeps the scores of a layer in memory": not is_flash,
        "the network's time is not known where nothing was compiled: times are too low": (
            compiled is None or compiled.found is None
        ),
        "the teacher reads the whole of its view in each row: what its views share is not taken off": bool(
            job.config.data.teacher_view
        ),
        "an XLA for GPUs never says that a step does not fit; JAX takes three quarters of a GPU's memory unless "
        "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise": kind == "gpu",
        "the teacher's layers come from the hosts' memory once a microbatch: that link's time is not among these": (
            job.teacher is not None and job.teacher.spec.offload
        ),
        "compiled, not run: speed and numbers are not verified": compiled is not None and not compiled.refused,
    }
    return [note for note, holds in said.items() if holds]


def sweep(config: Config, machine: Machine, price: float | None, compiled: int) -> list[Plan]:
    """Return plans of the config on meshes and microbatches that fill the machine, the fastest that fit first.

    All are estimated; the best are then compiled, from the top, until so many of these fit.
    """
    plans = []
    for candidate in candidates(config, machine.device_count - max(config.teacher_mesh.devices, 0)):
        try:
            plans.append((measure(candidate, machine, price, compiles=False), candidate))
        except UserError:  # a batch that does not split so
            continue
    if not plans:
        raise UserError(
            f"no mesh of {machine.name} splits batch_size {config.batch_size}; use a multiple of more chips"
        )
    plans.sort(key=lambda pair: rank(pair[0]))
    done, fitting = [], 0
    for number, (plan, candidate) in enumerate(plans):
        if fitting == compiled or plan["memory"]["peak_estimated"] > 2 * (plan["memory"]["limit"] or math.inf):
            done += [rest for rest, _ in plans[number:]]
            break
        done.append(measure(candidate, machine, price))
        fitting += done[-1]["memory"]["fits"] is not False
    return sorted(done, key=rank)


def rank(plan: Plan) -> tuple[bool, float]:
    """Return what plans are ordered by: whether they fit, then the time if nothing overlaps, else memory."""
    bounds = plan["estimate"]
    time = bounds["without_overlap"]["seconds"] if bounds else plan["memory"]["peak_estimated"]
    return plan["memory"]["fits"] is False, time


def candidates(config: Config, devices: int) -> list[Config]:
    """Return the config on every mesh of data, fsdp and tensor (up to 8), with 1 to 8 microbatches; context stays."""
    context = max(config.mesh.context, 1)
    devices //= context
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    made = []
    for tensor in (size for size in sizes if size <= 8):
        for fsdp in (size for size in sizes if devices % (size * tensor) == 0):
            mesh = replace(config.mesh, placement="jit", data=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
            mesh = replace(mesh, context=context, expert=1)
            made += [replace(config, mesh=mesh, microbatches=parts) for parts in (1, 2, 4, 8)]
    return made
