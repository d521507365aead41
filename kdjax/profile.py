"""Where a run's time goes on the way: what was compiled before the first step, and a trace of some steps by region."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from kdjax.errors import UserError

REGIONS = ("teacher", "student", "loss", "optimizer")
"""The named scopes of a training step. What a gradient computes bears the name of what it is the gradient of."""

_MODULE = re.compile(r"HloModule ([^\s,]+)")
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*\bop_name="([^"]*)"', re.MULTILINE)
_SCOPE = re.compile(rf"(?:^|[/(])({'|'.join(REGIONS)})[)/]")


@dataclass(frozen=True)
class Span:
    """Steps that are traced, the first and the last of them, counted from 1."""

    first: int
    last: int


def span(text: str) -> Span | None:
    """Return the steps that a text like ``10:15`` names; None where it is empty.

    Raises:
        UserError: it is another text.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            f"--profile.steps is {text!r}; wanted the first step and the last one to trace, from 1, as 10:15"
        )
    return Span(int(match[1]), int(match[2]))


@contextmanager
def compilations() -> Iterator[dict[str, float]]:
    """Count what jax compiles meanwhile: `programs`, the `seconds` that took, and `cached`, what it only had to read.

    Seconds of several threads add up.
    """
    found: dict[str, float] = {"programs": 0, "cached": 0, "seconds": 0}

    def took(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("/backend_compile_duration"):
            found["programs"] += 1
            found["seconds"] += duration_secs

    def happened(event: str, **kwargs: str | int) -> None:
        found["cached"] += event.endswith("/cache_hits")

    jax.monitoring.register_event_duration_secs_listener(took)
    jax.monitoring.register_event_listener(happened)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(took)
        jax.monitoring.unregister_event_listener(happened)


class Tracer:
    """Traces a span of steps into a directory, for xprof and for Perfetto; without a span it only names them."""

    def __init__(self, directory: Path, traced: Span | None) -> None:
        self._directory, self._span, self._is_on = directory, traced, False

    @contextmanager
    def step(self, number: int, before: Any) -> Iterator[None]:
        """Name what is done within as a step; with the first of the span tracing begins, once `before` is computed."""
        if self._span and not self._is_on and self._span.first <= number <= self._span.last:
            jax.block_until_ready(before)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python's would fill the trace
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
            self._is_on = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield

    def is_last(self, number: int) -> bool:
        """Return whether a step is the last one of the span, and is traced."""
        return self._is_on and self._span is not None and number == self._span.last

    def stop(self) -> Any:
        """End the trace; return it as a `jax.profiler.ProfileData`."""
        self.close()
        newest = max(self._directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        return jax.profiler.ProfileData.from_file(str(newest))

    def close(self) -> None:
        """End the trace if it is not over."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()


def shares(trace: Any, *modules: str) -> dict[str, float]:
    """Return which share each of `REGIONS`, and `other`, has of the time that devices spent in compiled modules.

    Args:
        trace: a `jax.profiler.ProfileData`.
        modules: their texts, whose metadata names the scope that each operation comes from. An operation that the
            compiler has fused out of several scopes counts for the one that it names.
    """
    regions = {found[1] if (found := _MODULE.match(text)) else text: _regions(text) for text in modules}
    devices = [plane for plane in trace.planes if plane.name.startswith("/device:")]
    total: dict[str, float] = defaultdict(float)
    for plane in devices or trace.planes:
        for line in plane.lines:
            for event, nanoseconds in _own_times(line.events):
                module, name = dict(event.stats).get("hlo_module"), _operation(event)
                known = [regions.get(module, {})] if module else regions.values()  # a TPU's events name none
                if (region := next((of[name] for of in known if name in of), None)) is not None:
                    total[region] += nanoseconds
    everything = sum(total.values())
    return {name: total[name] / everything for name in (*REGIONS, "other")} if everything else {}


def _regions(text: str) -> dict[str, str]:
    """Return instruction -> region of a module."""
    paths = _INSTRUCTION.findall(text)
    return {name: found[1] if (found := _SCOPE.search(path)) else "other" for name, path in paths}


def _own_times(events: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Yield each event, and how long it ran without those within it (a loop's, say)."""
    open_ones: list[list[Any]] = []  # event, end, time of its own

    def closed(before: float) -> Iterator[tuple[Any, float]]:
        while open_ones and open_ones[-1][1] <= before:
            event, _, own = open_ones.pop()
            yield event, own

    for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        yield from closed(event.start_ns)
        if open_ones:
            open_ones[-1][2] -= event.duration_ns
        open_ones.append([event, event.start_ns + event.duration_ns, event.duration_ns])
    yield from closed(float("inf"))


def _operation(event: Any) -> str:
    """Return the name of an event's operation; a TPU's events are named by the whole instruction."""
    named = next((value for key, value in event.stats if key == "hlo_op"), event.name)
    return str(named).split(" = ")[0].lstrip("%")
