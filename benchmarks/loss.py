"""How fast, how small and how exact the fused loss is, beside plain logits, PyTorch, TRL and Liger-Kernel.

COMMAND: python -m benchmarks.loss            (about 40 minutes on 2 CPU cores; --resume goes on where it stopped)

Everything in a case is measured in the same interleaved rounds, with all cores. Time is that of value and gradients.
Rows are appended to benchmarks/results/loss.jsonl; the last line printed is one JSON object.
Peers are optional: benchmarks/loss_peers.py says how to install them; a missing one is a printed line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from benchmarks import harness, loss_peers, loss_table
from benchmarks.harness import Progress, Row, Variant
from benchmarks.loss_accuracy import SIZE as ACCURACY_SIZE
from benchmarks.loss_accuracy import accuracy
from benchmarks.loss_cases import (
    DTYPES,
    Case,
    Inputs,
    Size,
    Skipped,
    beta_of,
    engine_makers,
    known,
    make_inputs,
    peer_makers,
    say_skipped,
)
from kdjax.losses import DIVERGENCES, ObjectiveConfig
from kdjax.losses.sizes import chunk_size

JSD = "jsd(beta=0.5)"
LARGE, WIDE = Size(4096, 128256, 576, 1024), Size(4096, 128256, 2048, 4096)
MIDDLE, SMALL, TINY = Size(2048, 49152, 576, 1024), Size(2048, 32000, 576, 1024), Size(64, 512, 16, 24)
LIGER = Size(8192, 128256, 2048, 4096)
"""The size at which Liger-Kernel publishes its figures."""
SIZES = [
    Size(n, v, *widths) for n in (2048, 4096) for v in (32000, 49152, 128256) for widths in ((576, 1024), (2048, 4096))
]
ALPHA = 0.5
RESULTS = harness.RESULTS / "loss.jsonl"
OVERHEAD = 1.15
"""Inputs and compiling, as a factor on a plan's operations."""


PACE = {"f32": 1.0, "bf16": 0.5}
"""Time of an operation in a dtype, to plan with."""


def every() -> list[str]:
    """Return every divergence, with parameters where a peer shares it."""
    return [JSD if name == "jsd" else name for name in DIVERGENCES]


def default_plan() -> list[Case]:
    """Return the cases of the default command, the most important first: those that time runs out for are the last."""
    plan = [Case(LARGE, dtype, "forward_kl", 7, 7) for dtype in DTYPES]
    plan += [Case(LARGE, "f32", JSD, 7, 7), Case(LARGE, "bf16", JSD, 7, 3)]
    plan += [Case(MIDDLE, dtype, JSD, 3, 3, 2) for dtype in DTYPES]
    plan += [Case(WIDE, dtype, "forward_kl", 2, 1) for dtype in DTYPES]
    plan += [Case(SMALL, dtype, name, 3, 1) for dtype in DTYPES for name in every()]
    plan += [Case(WIDE, "bf16", JSD, 2, 1)]
    return plan if jax.default_backend() == "cpu" else [*plan, Case(LIGER, "bf16", JSD, 7, 3, 7)]


def full_plan() -> list[Case]:
    """Return the default cases and the rest: all sizes, every divergence at a large one, and peers there."""
    plan = [Case(LARGE, "f32", JSD, 7, 7, 2), *default_plan()]
    plan += [Case(LARGE, dtype, name, 7, 7) for dtype in DTYPES for name in every()]
    plan += [Case(size, dtype, name, 7, 3) for size in SIZES for dtype in DTYPES for name in ("forward_kl", JSD)]
    return list({case[:3]: case for case in reversed(plan)}.values())[::-1]


def chosen_plan(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options ask for; unknown divergences are left out with a line."""
    if options.quick or options.sizes or options.divergences or options.dtype:
        sizes, names = options.sizes or [TINY if options.quick else LARGE], options.divergences or ["forward_kl", JSD]
        rounds = 2 if options.quick else 7
        plan = [
            Case(size, dtype, name, rounds, min(3, rounds), rounds if beta_of(name) is not None else 0)
            for size, dtype, name in itertools.product(sizes, options.dtype or DTYPES, names)
        ]
    else:
        plan = full_plan() if options.full else default_plan()
    if options.rounds:
        plan = [
            case._replace(
                rounds=options.rounds, least=options.rounds, peer_rounds=options.rounds * bool(case.peer_rounds)
            )
            for case in plan
        ]
    plan = plan if options.peers else [case._replace(peer_rounds=0) for case in plan]
    for name in dict.fromkeys(case.divergence for case in plan):
        if not known(name):
            print(f"skipped {name}: kdjax.losses.DIVERGENCES has no such row", file=sys.stderr)
    return list(dict.fromkeys(case for case in plan if known(case.divergence)))


def cost(case: Case) -> float:
    """Return the operations of a case, variants weighed by how they compare with bare matmuls."""
    ours = case.rounds * (2.6 + 1.2 + 0.6 + 1.0)
    theirs = sum(peer.cost for peer in loss_peers.PEERS.values() if not peer.needs_cuda) if case.peer_rounds else 0.0
    # A peer runs once more, before it is timed.
    return OVERHEAD * PACE[case.dtype] * case.size.floor * (ours + theirs * (case.peer_rounds + 1))


def measure(case: Case, x: Inputs, options: argparse.Namespace, progress: Progress) -> list[Row]:
    """Return the rows of a case."""
    objective = _objective(case.divergence, options)
    makers = engine_makers(case, x, objective)
    if case.peer_rounds:
        makers |= peer_makers(case, x, ALPHA)
    variants = [variant for name, make in makers.items() if (variant := _made(case, name, make)) is not None]
    planned = cost(case)
    share = planned / max(1.0, sum(variant.cost * variant.rounds for variant in variants))
    left = planned

    def on_trial(variant: Variant, trial: harness.Trial) -> None:
        nonlocal left
        left -= variant.cost * share
        progress.advance(variant.cost * share, f"{case}: {variant.name} {trial.seconds:.3g} s")

    deadline = progress.deadline(planned)
    trials = harness.interleave(variants, least=case.least, deadline=deadline, on_trial=on_trial)
    progress.drop(left)
    rows = [_row(case, variant, trials) for variant in variants]
    chunk = chunk_size(objective, case.size.tokens, case.size.vocab)
    for row in rows:
        row["chunk_tokens"] = chunk if row["variant"].startswith("chunked") else None
    return _with_floor(rows)


def _made(case: Case, name: str, make: Callable[[], Variant]) -> Variant | None:
    try:
        return make()
    except Skipped as reason:
        say_skipped(name, str(case), reason)
        return None


def _objective(divergence: str, options: argparse.Namespace) -> ObjectiveConfig:
    chunk = {"chunk_tokens": options.chunk_tokens} if options.chunk_tokens else {}
    return ObjectiveConfig(alpha=ALPHA, divergence=divergence, **chunk)


def _row(case: Case, variant: Variant, trials: harness.Trials) -> Row:
    mine = trials[variant.name]
    row: Row = {"what": "loss", "kind": "speed", "case": str(case)} | case.size._asdict()
    row |= {"dtype": case.dtype, "divergence": case.divergence, "variant": variant.name}
    row |= harness.summary(mine) | variant.facts
    row["tokens_per_second"] = case.size.tokens / row["seconds"]
    for base in ("plain", "chunked"):
        common = trials.get(base, {}) if variant.name != "matmuls" else {}
        row[f"ratio_to_{base}"] = harness.ratio(mine, common)
    return row


def _with_floor(rows: list[Row]) -> list[Row]:
    """Return rows with their share of the floor, by the matmuls' own rate in the same rounds."""
    rate = next((row["operations"] / row["seconds"] for row in rows if row["variant"] == "matmuls"), None)
    for row in rows:
        size = Size(row["weighted_tokens"], row["vocab"], row["student"], row["teacher"])
        row["matmul_flops"] = rate
        row["floor_share"] = size.floor / rate / row["seconds"] if rate else None
    return rows


class Recorder:
    """Knows what is measured already, and appends, shows and keeps what comes."""

    def __init__(self, path: Path | None, resume: bool) -> None:
        """Take the result file, None to write nothing, and whether to skip what it has of these sources."""
        self.path, self.here = path, harness.environment() | loss_peers.versions()
        rows = harness.read(path) if path and resume else []
        self.rows = [row for row in rows if harness.same_sources(row, self.here)]

    def has(self, case: str) -> bool:
        """Return whether a case is measured."""
        return any(row["case"] == case for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Append a case's rows and print them as a table."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rows = [row | {"at": at, "environment": self.here} for row in rows]
        self.rows.extend(rows)
        if self.path:
            harness.append(self.path, rows)
        print("\n".join([rows[0]["case"], *loss_table.table(rows), ""]), flush=True)


def run_accuracy(names: Sequence[str], recorder: Recorder, options: argparse.Namespace) -> None:
    """Measure how exact each divergence is, in each dtype."""
    jobs = [(f"accuracy of {name}, {dtype}", name, dtype) for name in names for dtype in options.dtype or DTYPES]
    for case, name, dtype in jobs:
        if recorder.has(case):
            continue
        print(case, file=sys.stderr, flush=True)
        rows = accuracy(_objective(name, options), dtype, TINY if options.quick else ACCURACY_SIZE, options.peers)
        recorder.add([{"what": "loss", "kind": "accuracy", "case": case} | row for row in rows])


def run_speed(plan: Sequence[Case], recorder: Recorder, options: argparse.Namespace, budget: float | None) -> None:
    """Measure a plan's cases; neighbours of one size and dtype share their inputs."""
    plan = [case for case in plan if not recorder.has(str(case))]
    progress = Progress(sum(map(cost, plan)), budget)
    for (size, dtype), cases in itertools.groupby(plan, key=lambda case: (case.size, case.dtype)):
        cases = list(cases)
        wanted, free = 2.5 * size.bytes(dtype), harness.available_bytes()
        if wanted > free:
            said = f"skipped {size}, {dtype}: inputs need {wanted / 1e9:.1f} GB, {free / 1e9:.1f} are free"
            print(said, file=sys.stderr, flush=True)
            progress.drop(sum(map(cost, cases)))
            continue
        x = make_inputs(size, dtype)
        for case in cases:
            if progress.is_over():
                progress.drop(cost(case))
                print(f"skipped {case}: no time left; --resume goes on here", file=sys.stderr, flush=True)
            else:
                recorder.add(measure(case, x, options, progress))
        del x


def headline(rows: Sequence[Row]) -> Row:
    """Return what the chunked loss's rows say, by case."""
    ours = [row for row in rows if row["kind"] == "speed" and row["variant"] == "chunked"]
    names = ("seconds", "ratio_to_plain", "floor_share", "temp_less_dw_bytes", "rounds")
    return {row["case"]: {name: row[name] for name in names} for row in ours}


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = made.add_argument
    flag("--quick", action="store_true", help="a tiny size, in seconds; nothing is recorded without --results")
    flag("--full", action="store_true", help="after the default cases, all sizes and divergences; hours, no time limit")
    flag("--sizes", type=_size, nargs="+", metavar="N,V,DS,DT", help="tokens, vocabulary, student and teacher width")
    flag("--divergences", nargs="+", metavar="NAME", help=f"of {', '.join(DIVERGENCES)}; parameters as in {JSD}")
    flag("--dtype", nargs="+", choices=list(DTYPES), help="of hidden states and matrices; default both")
    flag("--rounds", type=_positive, metavar="N", help="of every variant, instead of the plan's")
    flag(
        "--minutes",
        type=float,
        metavar="M",
        help="time limit: rounds, then cases are left out to keep it (default 38; --full none)",
    )
    flag("--chunk-tokens", type=_positive, metavar="C", help="default: the engine's")
    flag("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure others' losses too")
    flag("--accuracy", action=argparse.BooleanOptionalAction, default=True, help="measure errors too")
    flag("--resume", action="store_true", help="skip cases that the result file has of this device and these sources")
    flag("--results", type=Path, metavar="PATH", help=f"default {RESULTS.relative_to(harness.ROOT)}")
    flag(
        "--table", action="store_true", help="measure nothing: print the results as Markdown, as docs/losses.md has it"
    )
    flag("--plot", type=Path, metavar="SVG", help="measure nothing: draw time and memory relative to plain")
    return made


def _size(text: str) -> Size:
    try:
        return Size(*map(_positive, text.split(",")))
    except TypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; wanted N,V,DS,DT such as 2048,49152,576,1024") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; return the exit code."""
    options = parser().parse_args(arguments)
    path = options.results or (None if options.quick else RESULTS)
    if options.table or options.plot:
        rows = harness.read(options.results or RESULTS)
        print(loss_table.markdown(rows)) if options.table else loss_table.plot(rows, options.plot)
        return 0
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU
    start, minutes = time.monotonic(), options.minutes or (None if options.full else 38.0)
    plan, recorder = chosen_plan(options), Recorder(path, options.resume)
    print(f"{len(plan)} cases; results to {path or 'nowhere'}", file=sys.stderr, flush=True)
    if options.accuracy:
        run_accuracy(list(dict.fromkeys(case.divergence for case in plan)), recorder, options)
    run_speed(plan, recorder, options, 60 * minutes - (time.monotonic() - start) if minutes else None)
    said = {"what": "loss", "rows": len(recorder.rows), "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(said | {"chunked": headline(recorder.rows), "environment": recorder.here}))
    return 0


if __name__ == "__main__":
    harness.leave(main)
