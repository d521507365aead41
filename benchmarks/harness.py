"""What every benchmark needs: interleaved rounds with time and memory, an honest ETA, results that can be resumed.

Memory is measured the same way for all on a CPU: Linux's high-water mark of the process (VmHWM), reset before each
run through /proc/self/clear_refs, less what was resident then; freed memory is handed back first. So it counts what a
run needs over its inputs, its results included, whichever library allocates it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from kdjax.cli import INTERRUPTED, speak_plainly
from kdjax.commands import say
from kdjax.console import duration
from kdjax.environment import describe
from kdjax.errors import UserError
from kdjax.train import Stopped

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MADE = ("benchmarks/results", "docs", "README.md")
"""What measuring writes: a change here does not make the sources others."""

Row = dict[str, Any]
Meter = Callable[[Callable[[], Any]], int | None]
"""Runs a function and returns the bytes it needed at most, None where that cannot be known."""


class Trial(NamedTuple):
    """One timed run."""

    seconds: float
    bytes: int | None


def resident_growth(run: Callable[[], Any]) -> int | None:
    """Return by how much the process grew at most while running, results included; None but on Linux."""
    try:
        _reset_high_water()
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, AttributeError, KeyError):
        run()
        return None


def unmetered(run: Callable[[], Any]) -> None:
    """Run it; its memory is not asked for."""
    run()


def reset_peak() -> None:
    """Begin to count the most that the process holds anew; a device counts from its own beginning."""
    with suppress(OSError, AttributeError):
        _reset_high_water()


def _reset_high_water() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Return the most bytes that the first device held, or the process where it does not say; None but on Linux."""
    said = jax.local_devices()[0].memory_stats() or {}
    try:
        return said.get("peak_bytes_in_use") or _status("VmHWM")
    except (OSError, KeyError):
        return None


def peak_of(process: int) -> int | None:
    """Return the most bytes that another process held, from its start; None but on Linux."""
    try:
        return _status("VmHWM", process)
    except (OSError, KeyError):
        return None


def _status(name: str, process: int | str = "self") -> int:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def available_bytes() -> int:
    """Return the memory that can still be had without swapping."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@dataclass
class Variant:
    """One way of doing a thing, ready to run.

    Attributes:
        run: does it once and returns when it is done.
        rounds: in how many of the rounds it takes part.
        cost: operations, as a guess of its time before it has run.
        meter: how its memory is measured.
        facts: what is known of it without running.
    """

    name: str
    run: Callable[[], Any]
    rounds: int
    cost: float
    meter: Meter = resident_growth
    facts: Row = field(default_factory=dict)

    def trial(self) -> Trial:
        """Return the time and memory of one run; its results are dropped."""
        seconds = 0.0

        def timed() -> None:
            nonlocal seconds
            start = time.perf_counter()
            result = self.run()
            seconds = time.perf_counter() - start
            del result

        found = self.meter(timed)
        return Trial(seconds, found)


Trials = dict[str, dict[int, Trial]]
"""Variant -> round -> what was measured."""


def interleave(
    variants: Sequence[Variant],
    *,
    least: int,
    deadline: float = float("inf"),
    on_trial: Callable[[Variant, Trial], None] = lambda variant, trial: None,
) -> Trials:
    """Return the trials of all variants, one of each a round, so that a machine's moods meet all alike.

    Each round begins with another variant. No round begins after the deadline once `least` are done.
    """
    trials: Trials = {variant.name: {} for variant in variants}
    for number in range(max(variant.rounds for variant in variants)):
        if number >= least and time.monotonic() > deadline:
            break
        turn = number % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):
            if number < variant.rounds:
                trials[variant.name][number] = trial = variant.trial()
                on_trial(variant, trial)
    return trials


def summary(trials: Mapping[int, Trial]) -> Row:
    """Return median, quartiles and range of seconds, the largest memory, and the number of rounds."""
    seconds = [trial.seconds for trial in trials.values()]
    sizes = [trial.bytes for trial in trials.values() if trial.bytes is not None]
    return {
        "seconds": statistics.median(seconds),
        "seconds_quartiles": quartiles(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "rounds": len(seconds),
        "measured_bytes": max(sizes) if sizes else None,
    }


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile; of one number that number."""
    low, high = np.percentile(seconds, (25, 75)).tolist()
    return low, high


def ratio(trials: Mapping[int, Trial], base: Mapping[int, Trial]) -> float | None:
    """Return the median over common rounds of the time divided by the base's; None without a common round."""
    found = [trials[number].seconds / base[number].seconds for number in trials.keys() & base.keys()]
    return statistics.median(found) if found else None


class Progress:
    """Says on stderr what was just measured and when all will be done, from the pace so far."""

    def __init__(self, cost: float, budget: float | None) -> None:
        """Take the operations of the whole plan, and the seconds it may last."""
        self.start, self.left, self.done, self.budget = time.monotonic(), cost, 0.0, budget

    def deadline(self, cost: float) -> float:
        """Return when a case of that cost must end, so that all cases to come get their share of what is left."""
        if self.budget is None:
            return float("inf")
        now = time.monotonic()
        return now + max(0.0, self.start + self.budget - now) * cost / max(self.left, cost)

    def is_over(self) -> bool:
        """Return whether the budget is spent."""
        return self.budget is not None and time.monotonic() > self.start + self.budget

    def advance(self, cost: float, said: str) -> None:
        """Count operations as done, and say so."""
        self.left, self.done = max(0.0, self.left - cost), self.done + cost
        passed = time.monotonic() - self.start
        left = passed * self.left / self.done
        left = left if self.budget is None else min(left, max(0.0, self.budget - passed))
        print(f"{said}  eta {duration(left)}", file=sys.stderr, flush=True)

    def drop(self, cost: float) -> None:
        """Leave out operations that will not be done."""
        self.left = max(0.0, self.left - cost)


def environment() -> Row:
    """Return device, load, versions and commit; `dirty` is a hash of what differs from the commit, False if nothing.

    The load is that of the minute before: processes that wanted a core, in the mean.
    """
    found: Row = describe()
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    if found["platform"] == "cpu":
        found["cpu_model"] = _cpu_model()
    if "commit" in found:
        others = [f":(exclude){path}" for path in MADE]
        command = ["git", "-C", str(ROOT), "diff", "HEAD", "--", ".", *others]
        changes = subprocess.run(command, capture_output=True, timeout=30, check=False).stdout
        dirty = hashlib.sha256(changes).hexdigest()[:8] if changes else False
        found |= {"commit": str(found["commit"]).rstrip("+"), "dirty": dirty}
    return found


def measured_on(environment: Row) -> str:
    """Return on what a row was measured, for below its table."""
    here = environment
    return f"{machine(here)}; python {here['python']}, jax {here['jax']}; commit {here.get('commit')}"


def machine(environment: Row) -> str:
    """Return the device's name and how many of it there were, or how many cores of a CPU were used."""
    here = environment
    if here["platform"] != "cpu":
        return f"{here.get('devices', 1)} × {here['device']} ({here['platform']})"
    cores = here.get("cpu_cores", 1)
    return f"{here.get('cpu_model') or here['device']} (cpu, {cores} core{'s' * (cores != 1)})"


def _cpu_model() -> str | None:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", path.read_text(), re.M) if path.exists() else []
    return names[0] if names else None


def read(path: Path) -> list[Row]:
    """Return the rows of a result file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def parser(
    doc: str | None, results: Path, quick: str = "a trial of seconds on small models; nothing is kept"
) -> argparse.ArgumentParser:
    """Return a parser of what benchmarks take alike: where rows go, and --quick, with which none do.

    From here on kdjax's own remarks are shown, as by its command line.
    """
    speak_plainly()
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--results", type=Path, default=results, metavar="PATH", help="where rows are kept")
    made.add_argument("--quick", action="store_true", help=quick)
    return made


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark and leave with its exit code; bad input is one line, and 2, and a signal 128 and its number."""
    try:
        sys.exit(main())
    except UserError as error:
        say(str(error))
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stop:
        say("stopped; rows that were told are kept, and the same command goes on")
        sys.exit(getattr(stop, "exit_code", INTERRUPTED))


def kept(options: argparse.Namespace) -> list[Row]:
    """Return the rows that there are; none in a trial."""
    return [] if options.quick else read(options.results)


def tell(options: argparse.Namespace, row: Row, environment: Row) -> Row:
    """Return a row with its environment, kept unless this is a trial; print it as a line of JSON.

    What was compiled for it is let go of: Linux ends a process that maps more than `vm.max_map_count` pieces of memory,
    and some forty runs have that many.
    """
    print(json.dumps(row), flush=True)
    row = row | {"environment": environment}
    if not options.quick:
        append(options.results, [row])
    jax.clear_caches()
    return row


def tell_anew(options: argparse.Namespace, rows: Iterable[Row], environment: Row) -> list[Row]:
    """Return rows with their environment, each printed as it comes; at the end they take the place of the old ones."""
    made = []
    for row in rows:
        print(json.dumps(row), flush=True)
        made.append(row | {"environment": environment})
    if not options.quick:
        options.results.unlink(missing_ok=True)
        append(options.results, made)
    return made


@contextmanager
def home(options: argparse.Namespace, given: Path) -> Iterator[Path]:
    """Yield the directory that runs are kept in; of a trial one that is gone afterwards."""
    if not options.quick:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def same_sources(row: Row, here: Row) -> bool:
    """Return whether a row was measured on this device and these sources."""
    names = ("device", "cpu_model", "platform", "devices", "cpu_cores", "commit", "dirty")
    return all(row["environment"].get(name) == here.get(name) for name in names)
