"""A plan as rows of text: the table on the console and the page in docs/plans are the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from kdjax.console import MISSING, amount, count, percent, table

Plan = Mapping[str, Any]


def gib(size: Any) -> str:
    """Return bytes as ``3.45 GiB``, or MiB below a tenth of one."""
    if size is None:
        return MISSING
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.2f} MiB"


def seconds(value: Any) -> str:
    """Return seconds as ``0.415 s`` or ``12.3 ms``."""
    if value is None:
        return MISSING
    return f"{value:.3f} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def flop(value: Any) -> str:
    """Return FLOPs as ``12.3 PFLOP``."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:,.3g} {letter}FLOP"
    return f"{value / 1e6:,.3g} MFLOP"


def _fits(plan: Plan) -> str:
    memory = plan["memory"]
    if memory["fits"] is None:
        return "the chip's memory is not known"
    share = percent(memory["peak"] / memory["limit"]) if memory["peak"] else MISSING
    return f"{'yes' if memory['fits'] else 'NO'} ({share} of {gib(memory['limit'])})"


def _estimated(*path: str, show: Callable[[Any], str]) -> Callable[[Plan], str]:
    def cell(plan: Plan) -> str:
        value = plan["estimate"]
        for key in path:
            value = value.get(key) if value else None
        return MISSING if value is None else show(value)

    return cell


def _mesh(plan: Plan) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "1 device"


def _apart(show: Callable[[Plan], str]) -> Callable[[Plan], str]:
    return lambda plan: show(plan["apart"]) if plan.get("apart") else MISSING


def _loss(plan: Plan) -> str:
    is_chunked = plan["loss"] == "chunked"
    return f"chunked, {plan['chunk_tokens']:,} tokens at a time" if is_chunked else "plain, all tokens at once"


def _dollars(value: float) -> str:
    return f"${value:,.2f}"


ROWS: dict[str, Callable[[Plan], str]] = {
    "machine": lambda plan: f"{plan['topology']}, {plan['chips']} chip{'s' * (plan['chips'] > 1)}",
    "memory and collectives by": lambda plan: plan["by"],
    "mesh": _mesh,
    "batch": lambda plan: f"{plan['batch_size']} × {plan['sequence_length']}, {plan['microbatches']} microbatch(es)",
    "remat": lambda plan: plan["remat"],
    "loss": _loss,
    "parameters: teacher, student": lambda plan: ", ".join(count(size) for size in plan["parameters"].values()),
    "teacher, a device": lambda plan: gib(plan["memory"]["teacher"]),
    "teacher, in the host's memory": lambda plan: gib(plan["memory"].get("host") or None),
    "student, a device": lambda plan: gib(plan["memory"]["student"]),
    "optimiser, a device": lambda plan: gib(plan["memory"]["optimizer"]),
    "activations and other work, a device": lambda plan: gib(plan["memory"]["work"]),
    "peak, a device": lambda plan: gib(plan["memory"]["peak"]),
    "fits": _fits,
    "teacher apart, on devices": _apart(lambda apart: str(apart["devices"])),
    "their mesh": _apart(_mesh),
    "teacher, one of them": _apart(lambda apart: gib(apart["memory"]["teacher"])),
    "peak, one of them": _apart(lambda apart: gib(apart["memory"]["peak"])),
    "fits there": _apart(_fits),
    "FLOPs of a step: teacher": lambda plan: flop(plan["flops"]["teacher"]),
    "student": lambda plan: flop(plan["flops"]["student"]),
    "computed again (remat)": lambda plan: flop(plan["flops"]["recompute"]),
    "both heads": lambda plan: flop(plan["flops"]["loss"]),
    "least time: FLOPs": _estimated("seconds", "compute", show=seconds),
    "least time: memory": _estimated("seconds", "memory", show=seconds),
    "least time: network": _estimated("seconds", "network", show=seconds),
    "least time: teacher's own devices": _estimated("seconds", "teacher", show=seconds),
    "step at best (all overlaps)": _estimated("at_best", "seconds", show=seconds),
    "tokens/s at best": _estimated("at_best", "tokens_per_second", show=amount),
    "MFU at best": _estimated("at_best", "mfu", show=percent),
    "$ per billion tokens at best": _estimated("at_best", "dollars_per_billion_tokens", show=_dollars),
    "step, nothing overlaps": _estimated("without_overlap", "seconds", show=seconds),
    "tokens/s, nothing overlaps": _estimated("without_overlap", "tokens_per_second", show=amount),
    "MFU, nothing overlaps": _estimated("without_overlap", "mfu", show=percent),
    "$ per billion tokens, nothing overlaps": _estimated(
        "without_overlap", "dollars_per_billion_tokens", show=_dollars
    ),
}
"""What stands before a row -> its cell."""

Cells = tuple[list[str], list[list[str]]]


def figures(plans: Sequence[Plan]) -> Cells:
    """Return headings and rows, a column for each plan; rows that no plan has are left out."""
    rows = [[name, *(cell(plan) for plan in plans)] for name, cell in ROWS.items()]
    return ["", *(plan["topology"] for plan in plans)], [row for row in rows if set(row[1:]) != {MISSING}]


def sent(plan: Plan) -> Cells:
    """Return headings and rows of a device's collectives in a step, and of those of a teacher apart."""
    found = {"": plan["collectives"], "teacher's ": (plan.get("apart") or {}).get("collectives")}
    rows = [
        [who + row["kind"], row["axis"], str(row["group"]), count(row["times"]), gib(row["bytes"]), gib(row["sent"])]
        for who, some in found.items()
        for row in some or ()
    ]
    return ["collective", "axis", "devices", "times a step", "bytes", "sent by a device"], rows


def ranked(plans: Sequence[Plan]) -> Cells:
    """Return headings and rows of a sweep, the best first."""
    headings = ["mesh", "microbatches", "peak", "fits", "tokens/s at best", "nothing overlaps", "by"]
    speed = [_estimated(name, "tokens_per_second", show=amount) for name in ("at_best", "without_overlap")]
    return headings, [
        [
            _mesh(plan),
            str(plan["microbatches"]),
            gib(plan["memory"]["peak"]),
            {True: "yes", False: "no", None: MISSING}[plan["memory"]["fits"]],
            *(cell(plan) for cell in speed),
            plan["by"],
        ]
        for plan in plans
    ]


def plan_table(plan: Plan) -> RenderableType:
    """Return a plan as tables and lines for the console."""
    parts: list[RenderableType] = [table(*figures([plan]))]
    if sent(plan)[1]:
        parts += ["", table(*sent(plan))]
    return Group(*parts, "", *map(Text, said(plan)))


def sweep_table(plans: Sequence[Plan], most: int = 20) -> RenderableType:
    """Return the best plans of a sweep as a table."""
    headings, rows = ranked(plans)
    return table(headings, rows[:most])


def said(plan: Plan) -> list[str]:
    """Return what is to be said beside the figures."""
    refused = [f"the compiler: {plan['memory']['refused']}"] if plan["memory"]["refused"] else []
    change = [f"to make it fit: {line}" for line in plan["advice"]]
    return [*refused, *change, *(f"note: {note}" for note in plan["notes"])]


def markdown(title: str, plans: Sequence[Plan]) -> str:
    """Return a page: figures side by side, then each plan's collectives and remarks."""
    lines = [f"# {title}", "", *_markdown_table(*figures(plans))]
    for plan in plans:
        lines += ["", f"## {plan['topology']}, loss {_loss(plan)}", ""]
        if sent(plan)[1]:
            lines += [*_markdown_table(*sent(plan)), ""]
        lines += [f"- {line}" for line in said(plan)]
    return "\n".join(lines) + "\n"


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = [":--" if number == 0 else "--:" for number in range(len(headings))]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *rows)]
