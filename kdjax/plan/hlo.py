"""What a device does in one call of a compiled step, read off its HLO text: collectives, and FLOPs of its matmuls."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
"""Of types whose name does not end in their number of bits."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][\w\-]*)\(")
_NAME = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = ")
_DOT = re.compile(r" dot\((?:[^%)]*? )?%?([\w.\-]+),.*\blhs_contracting_dims=\{([\d,]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^%?([\w.\-]+) = \S+ constant\((\d+)\)")
_BELOW = re.compile(r"^ROOT .* compare\([^,]*?, (?:\S+ )?%?([\w.\-]+)\), direction=LT")
_CHANNEL = re.compile(r"channel_id=(\d+).*chain_id=")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one axis, all of a step added up.

    Attributes:
        kind: as HLO names it.
        axis: of the mesh, several joined by ``+``; ``?`` where no axes of it make up the groups.
        group: how many devices take part in each.
        times: how often a device runs one in a step.
        bytes: what is gathered, reduced or passed on, whole, all of a step's added up.
    """

    kind: str
    axis: str
    group: int
    times: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, by the algorithm of a ring."""
        share = (self.group - 1) / self.group if self.group > 1 else 0.0
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclass
class _Computation:
    own: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Kind, axis, size of the group and bytes of each collective."""
    flops: float = 0.0
    """Of its own matmuls."""
    shapes: dict[str, str] = field(default_factory=dict)
    """What its instructions give."""
    calls: list[tuple[str, int | str]] = field(default_factory=list)
    """Computations that it runs, and how often, or the name of the condition that says it."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Its constants."""
    limit: str = ""
    """Of a loop's condition: the number that its counter stays below."""


def collectives(hlo: str, mesh: Mapping[str, int], unknown_trips: int = 1) -> list[Collective]:
    """Return the collectives that a device runs in one call of a compiled module, those of most bytes first.

    Args:
        hlo: the module's text after all passes (`compiled.as_text()`).
        mesh: size of each axis, in the mesh's order, which numbers the devices.
        unknown_trips: how often a loop runs whose text does not say it, as that over the loss's chunks.
    """
    entry, computations = _parsed(hlo, mesh)
    found: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])
    for name, times in _runs(entry, computations, unknown_trips):
        for kind, axis, group, size in computations[name].own:
            total = found[kind, axis, group]
            total[0], total[1] = total[0] + times, total[1] + times * size
    rows = [Collective(*key, *total) for key, total in found.items()]
    return sorted((row for row in rows if row.group > 1), key=lambda row: -row.bytes)


def matmul_flops(hlo: str, mesh: Mapping[str, int], unknown_trips: int = 1) -> float:
    """Return the FLOPs of matmuls that a device runs in one call: 2 for each multiplication with its addition.

    Matmuls that a compiler has made into calls of a library are not seen; of those here none does on a CPU.
    """
    entry, computations = _parsed(hlo, mesh)
    return sum(times * computations[name].flops for name, times in _runs(entry, computations, unknown_trips))


def _runs(entry: str, computations: Mapping[str, _Computation], unknown: int, times: int = 1) -> Iterator:
    """Yield each computation that is run, and how often, once for each caller."""
    yield entry, times
    for called, trips in computations[entry].calls:
        if called in computations:  # else a reducer of two numbers
            known = computations[trips].numbers.get(computations[trips].limit) if isinstance(trips, str) else trips
            yield from _runs(called, computations, unknown, times * (unknown if known is None else known))


def _parsed(hlo: str, mesh: Mapping[str, int]) -> tuple[str, dict[str, _Computation]]:
    entry, computations, current, seen = "", {}, _Computation(), set()
    for line in map(str.strip, hlo.splitlines()):
        if opened := _COMPUTATION.match(line):
            current = computations.setdefault(opened[2], _Computation())
            entry = opened[2] if opened[1] else entry
        elif number := _CONSTANT.match(line):
            current.numbers[number[1]] = int(number[2])
        elif instruction := _INSTRUCTION.match(line):
            shape, opcode = instruction[1], instruction[2]
            if named := _NAME.match(line):
                current.shapes[named[1]] = shape
            if dot := _DOT.search(line):
                contracted = [_sizes(current.shapes[dot[1]])[int(axis)] for axis in dot[2].split(",") if axis]
                current.flops += 2.0 * math.prod(_sizes(shape)) * math.prod(contracted)
            if opcode.removesuffix("-start") in KINDS:
                # On a TPU one collective that is spread over several fusions stands in each, in one channel.
                channel = _CHANNEL.search(line)
                if channel is None or channel[1] not in seen:
                    current.own.append(_collective(line, shape, opcode, mesh))
                seen |= {channel[1]} if channel else set()
            elif not opcode.endswith(("-done", "-update")):
                current.calls += _called(line, opcode)
            if below := _BELOW.match(line):
                current.limit = below[1]
    return entry, computations


def _called(line: str, opcode: str) -> Iterator[tuple[str, int | str]]:
    """Yield the computations that an instruction runs, and how often."""
    known, condition = _TRIPS.search(line), _CONDITION.search(line)
    trips = 1 if opcode != "while" or not condition else int(known[1]) if known else condition[1]
    for names in _CALLED.findall(line):
        for name in names.strip("{}").split(","):
            yield name.strip(" %"), trips


def _collective(line: str, shape: str, opcode: str, mesh: Mapping[str, int]) -> tuple[str, str, int, int]:
    kind = opcode.removesuffix("-start")
    axis, group = axis_of(line, mesh)
    sizes = [_bytes(*part) for part in _SHAPE.findall(shape)]
    if opcode in ("all-gather-start", "reduce-scatter-start"):  # (what is given, what comes back)
        sizes = sizes[len(sizes) // 2 :]
    if opcode == "collective-permute-start":
        sizes = sizes[:1]
    return kind, axis, group, sum(sizes) * (group if kind == "reduce-scatter" else 1)


def _sizes(shape: str) -> list[int]:
    """Return the sizes of an array's shape as HLO writes it."""
    (found,) = _SHAPE.findall(shape)
    return [int(size) for size in found[1].split(",") if size]


def _bytes(dtype: str, sizes: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", dtype)
    bits = BITS.get(dtype) or (int(digits[1]) if digits else 0)
    return math.prod(map(int, filter(None, sizes.split(",")))) * bits // 8


def axis_of(line: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    """Return the mesh axes over which an instruction's groups of devices go, and how many devices a group has."""
    shape = tuple(mesh.values())
    groups = _groups(line, math.prod(shape))
    varies = np.zeros(len(shape), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, shape))
        varies |= (places != places[:, :1]).any(axis=1)
    names = [name for name, moves in zip(mesh, varies, strict=True) if moves]
    size = math.prod(mesh[name] for name in names)
    if "source_target_pairs=" in line:
        return "+".join(names) or "?", size
    return "+".join(names) if size == len(groups[0]) else "?", len(groups[0])


def _groups(line: str, devices: int) -> list[list[int]]:
    """Return the groups of devices in any of the ways that HLO writes them; none written is all devices."""
    if listed := _LISTED.search(line):
        found = [[int(n) for n in group.split(",") if n.strip()] for group in re.findall(r"\{([\d, ]*)\}", listed[1])]
        return [group for group in found if group] or [list(range(devices))]
    if iota := _IOTA.search(line):
        shape, reshaped, order = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
        numbers = np.arange(math.prod(reshaped)).reshape(reshaped)
        return (numbers.transpose(order) if order else numbers).reshape(shape).tolist()
    if named := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[2])]
        return (
            np.moveaxis(numbers, over, range(-len(over), 0))
            .reshape(-1, math.prod(numbers.shape[n] for n in over))
            .tolist()
        )
    return [list(range(devices))]
