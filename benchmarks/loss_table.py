"""What benchmarks.loss measured, as tables in Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.loss_peers import PEERS

Row = dict[str, Any]
MISSING = "–"


def _number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Return a number with so many digits that count, and its unit."""
    if value is None:
        return MISSING
    shown = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return (f"{float(shown):.1e}" if "e" in shown else shown) + unit


def _seconds(row: Row) -> str:
    return f"{_number(row['seconds'])} ({_number(row['seconds_min'])} to {_number(row['seconds_max'])})"


def _megabytes(name: str) -> Callable[[Row], str]:
    return lambda row: _number(row[name] / 1e6 if row.get(name) is not None else None)


def _figure(name: str, factor: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(name)
        return _number(value * factor if value is not None else None, unit)

    return cell


Columns = dict[str, Callable[[Row], str]]
SPEED: Columns = {
    "variant": lambda row: row["variant"] + (f", chunks of {row['chunk_tokens']:,}" if row.get("chunk_tokens") else ""),
    "seconds (range)": _seconds,
    "rounds": lambda row: str(row["rounds"]),
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "time to plain": _figure("ratio_to_plain"),
    "time to chunked": _figure("ratio_to_chunked"),
    "share of floor": _figure("floor_share", 100, " %"),
    "temporary MB": _megabytes("temp_less_dw_bytes"),
    "with dW sum": _megabytes("temp_with_dw_bytes"),
    "measured MB": _megabytes("measured_bytes"),
}
ACCURACY: Columns = {
    "divergence": lambda row: f"`{row['divergence']}`",
    "variant": lambda row: row["variant"],
    "dtype": lambda row: row["dtype"],
    "std of logits": lambda row: str(row["std"]),
    "value": _figure("value"),
    "error of value": _figure("value_error", 100, " %"),
    "of dh": _figure("dh_error", 100, " %"),
    "of dW": _figure("dw_error", 100, " %"),
    "smallest": _figure("smallest"),
}
OVERVIEW: Columns = {
    "divergence": lambda row: f"`{row['divergence']}`",
    "dtype": lambda row: row["dtype"],
    "seconds (range)": _seconds,
    "rounds": lambda row: str(row["rounds"]),
    "time to plain": _figure("ratio_to_plain"),
    "half masked": _figure("half_to_plain"),
    "share of floor": _figure("floor_share", 100, " %"),
    "temporary MB": _megabytes("temp_less_dw_bytes"),
    "of plain": _megabytes("plain_bytes"),
}
"""Of the chunked loss alone, a row for each case."""
KINDS = {"speed": SPEED, "accuracy": ACCURACY, "overview": OVERVIEW}
MANY = 3
"""Cases of one size and dtype beyond which they share a table."""


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table of rows of one kind."""
    columns = KINDS[rows[0]["kind"]]
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


IDENTITY = ("kind", "tokens", "vocab", "student", "teacher", "dtype", "divergence")


def newest(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each problem on each kind of device, those of its last run alone, in the order first seen."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        group = groups.setdefault((row["environment"]["platform"], *(row.get(name) for name in IDENTITY)), [])
        if group and group[0]["at"] != row["at"]:
            group.clear()
        group.append(row)
    return list(groups.values())


def markdown(rows: Sequence[Row]) -> str:
    """Return all that was measured: a section for each device, a table for each case, and one of accuracy."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.loss` writes the figures that stand here."
    cases, lines = newest(rows), []
    for device in dict.fromkeys(harness.machine(case[0]["environment"]) for case in cases):
        mine = [case for case in cases if harness.machine(case[0]["environment"]) == device]
        lines += [f"Measured on {device}; {_versions(mine)}.", ""]
        speed, many = _split(case for case in mine if case[0]["kind"] == "speed")
        for case in speed:
            lines += [f"**{_title(case[0])}**", "", *table(case), ""]
        for cases_of_size in many:
            title = f"Chunked loss, every divergence, {_size(cases_of_size[0][0])}"
            shown = table([_overview(case) for case in cases_of_size])
            lines += ["<details>", f"<summary>{title}</summary>", "", *shown, "", "</details>", ""]
        exact = [row for case in mine if case[0]["kind"] == "accuracy" for row in case]
        if exact:
            lines += ["<details>", "<summary>Accuracy of every divergence, cross entropy left out</summary>", ""]
            lines += [*table(exact), "", "</details>", ""]
    return "\n".join([*lines, LEGEND])


LEGEND = (
    "Median (range) of value and gradients over interleaved rounds; ratios are medians of those of each round. "
    "Temporary memory is the compiler's own figure, without and with the float32 sum of dW; measured is how much the "
    "process grew at most in a run, its results included, for all alike. The floor is what the bare matmuls would "
    "take: 2·N·V·(D_s + D_t) + 4·N·V·D_s operations at the rate of the row *matmuls*, which does them 1,024 tokens "
    "at a time. TRL's loss and Liger's in Triton have no cross entropy and are timed without. Errors are relative "
    "(root mean square) to float32 whole logits on the same inputs; the smallest is that of single tokens, of random "
    "and of nearly equal models."
)


def _split(cases: Iterable[list[Row]]) -> tuple[list[list[Row]], list[list[list[Row]]]]:
    """Return cases that have a table of their own, and those of each size that has too many for that."""
    by_size: dict[str, list[list[Row]]] = {}
    for case in cases:
        by_size.setdefault(_size(case[0]), []).append(case)
    few, many = [], []
    for found in by_size.values():
        if len(found) > MANY * len({case[0]["dtype"] for case in found}):
            many.append(found)
        else:
            few += found
    return few, many


def _overview(case: Sequence[Row]) -> Row:
    """Return one row of what a case says of the chunked loss."""
    by = {row["variant"]: row for row in case}
    plain, half = by.get("plain", {}), by.get("chunked, half masked", {})
    more = {"plain_bytes": plain.get("temp_less_dw_bytes"), "half_to_plain": half.get("ratio_to_plain")}
    return by["chunked"] | more | {"kind": "overview"}


def _size(row: Row) -> str:
    return f"{row['tokens']:,} tokens, V {row['vocab']:,}, D {row['student']:,}/{row['teacher']:,}"


def _title(row: Row) -> str:
    rate = row.get("matmul_flops")
    return f"`{row['divergence']}`, {_size(row)}, {row['dtype']}" + (f", {rate / 1e9:,.0f} GFLOP/s" if rate else "")


def _versions(cases: Sequence[Sequence[Row]]) -> str:
    def seen(name: str) -> str:
        values = (row["environment"].get(name) for case in cases for row in case)
        return " and ".join(dict.fromkeys(str(value) for value in values if value is not None))

    names = ("python", "kdjax", "jax", "torch", "trl", "liger-kernel")
    versions = ", ".join(f"{name} {seen(name)}" for name in names if seen(name))
    changed = " with changes" if any(row["environment"].get("dirty") for case in cases for row in case) else ""
    return f"{versions}; commit {seen('commit')}{changed}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw time and measured memory relative to plain, a group of bars for each case that has a plain row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "kdjax"
    cases = [case for case in newest(rows) if any(row.get("ratio_to_plain") for row in case)]
    largest = max(case[0]["vocab"] for case in cases)
    cases = [[row for row in case if row["variant"] != "matmuls"] for case in cases]
    cases = [case for case in cases if case[0]["vocab"] == largest or any(row["variant"] in PEERS for row in case)]
    bars = [2 + len(case) for case in cases]  # title and room between count as two
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(9, 1 + 0.27 * sum(bars)), squeeze=False, sharex="col", height_ratios=bars
    )
    for (left, right), shown in zip(axes, cases, strict=True):
        names = [row["variant"] for row in shown]
        base = next(row["measured_bytes"] for row in shown if row["variant"] == "plain")
        left.barh(names, [row["ratio_to_plain"] or 0 for row in shown])
        right.barh(names, [row["measured_bytes"] / base if base and row["measured_bytes"] else 0 for row in shown])
        left.set_title(_title(shown[0]).replace("`", ""), fontsize=8, loc="left")
        right.set_yticks([])
        for axis in (left, right):
            axis.invert_yaxis()
            axis.axvline(1, color="grey", linewidth=0.8)
    axes[-1][0].set_xlabel("time relative to plain")
    axes[-1][1].set_xlabel("memory relative to plain")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
