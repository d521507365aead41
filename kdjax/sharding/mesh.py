"""How devices are asked to be arranged: the axes of a mesh, and their sizes."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import prod
from typing import Literal

from kdjax.errors import UserError

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that hold different examples."""

AXES = (*BATCH_AXES, "context", "tensor")
"""All of them; those along the last ones share examples, so they lie nearest to each other."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; -1 takes all that are left (at most one axis)."""

    placement: Literal["jit", "pmap"] = "jit"
    """`jit` on a mesh of any shape, or `pmap`: replicated data parallelism for models that fit one device."""
    data: int = -1
    """Copies of the parameters, each with its own examples."""
    fsdp: int = 1
    """Parameters split over devices that also have their own examples."""
    expert: int = 1
    """Experts split over devices that also have their own examples; all other parameters are copied to each."""
    context: int = 1
    """Tokens of each row split over devices that share examples, for rows too long for one."""
    tensor: int = 1
    """Heads, mlp and vocabulary split over devices that share examples."""

    def shape(self, devices: int) -> dict[str, int]:
        """Return the size of each mesh axis on so many devices.

        Raises:
            UserError: sizes that cannot fill them, with a mesh that can.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        bad = {name: size for name, size in sizes.items() if size < 1 and size != -1}
        if bad:
            raise UserError(f"mesh sizes {bad}; wanted at least 1 each, or -1 for all devices that are left")
        open_axes = [name for name, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise UserError(f"mesh.{' and mesh.'.join(open_axes)} are -1; only one axis can take what is left")
        known = prod(size for size in sizes.values() if size != -1)
        if devices % known or (not open_axes and known != devices):
            fill = ", ".join(f"{name}={-1 if name == 'data' else max(1, sizes[name])}" for name in sizes)
            raise UserError(
                f"a mesh of {sizes_text(sizes)} does not fill {devices} devices; "
                + (
                    f"use {fill}"
                    if devices % prod(s for n, s in sizes.items() if n != "data" and s > 0) == 0
                    else f"{' * '.join(AXES[1:])} must divide {devices}"
                )
            )
        return {name: devices // known if size == -1 else size for name, size in sizes.items()}


@dataclass(frozen=True)
class TeacherMeshConfig(MeshConfig):
    """Where the teacher lies, if not where the student does."""

    devices: int = 0
    """0: the teacher runs within the student's step, on its mesh. A number: so many of all devices are the teacher's
    alone, as many in each process. -1: all devices are both's, the teacher's parts arranged in a way of its own."""

    def __post_init__(self) -> None:
        if self.devices < -1:
            raise UserError(f"teacher_mesh.devices is {self.devices}; wanted -1, 0 or a number of devices")
        if self.placement != "jit":
            raise UserError("teacher_mesh.placement is pmap; a teacher on a mesh of its own is placed by jit")
        if not self.devices and astuple(self)[:-1] != astuple(MeshConfig()):
            raise UserError(
                "teacher_mesh is set, but teacher_mesh.devices is 0; give the teacher a number of devices, or -1 for "
                "all of them, shared with the student"
            )


def sizes_text(sizes: dict[str, int]) -> str:
    """Return ``data=4, fsdp=2, …``."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
