"""Puts what was measured into README.md and pages of docs, between markers, so that no figure there is ever typed.

COMMAND: python -m benchmarks.readme          (--check changes nothing, and exits with 1 where a page differs)
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks import (
    answers,
    arms,
    cache,
    checkpoint,
    data,
    effect,
    generate,
    gist,
    harness,
    kinds,
    knowledge,
    loss_compiled,
    loss_table,
    memory,
    models,
    peers,
    pipeline,
    prompt_distill,
    prompts,
    quality_table,
    runs,
    scaling,
    screening,
    search,
    start,
    step,
    students,
    teacher,
    teachers,
    tokenizers,
)

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LOSSES = ROOT / "docs" / "losses.md"
MODELS = ROOT / "docs" / "models.md"
STUDENTS = ROOT / "docs" / "students.md"
GENERATION = ROOT / "docs" / "generation.md"
MEMORY = ROOT / "docs" / "memory.md"
SCALING = ROOT / "docs" / "scaling.md"
PROMPTS = ROOT / "docs" / "prompts.md"
SEARCH = ROOT / "docs" / "search.md"
EFFECT = ROOT / "docs" / "effect.md"
CASE_STUDY = ROOT / "docs" / "case-study.md"
TEACHERS = ROOT / "docs" / "teachers.md"
BENCHMARKS = ROOT / "benchmarks" / "README.md"
RESULTS = Path(__file__).parent / "results"

Rows = Sequence[dict[str, Any]]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % interval by Student's t (0 for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def amount(values: Sequence[float], unit: str = "") -> str:
    """Return ``1.534 ± 0.012``: as many decimals as one reads, and no interval where all values are equal."""
    mean, half = interval(values)
    decimals = next((n for n, limit in ((3, 10), (2, 100), (1, 1000)) if abs(mean) < limit), 0)
    if unit == "%":
        decimals = 1
    spread = f" ± {half:,.{decimals}f}" if max(values) > min(values) else ""
    return f"{mean:,.{decimals}f}{spread}{f' {unit}' if unit else ''}"


def quickstart(results: Path) -> str:
    """Return the quickstart's table and what it was measured on."""
    path = results / "quickstart.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    by = {name: [row for row in rows if row["objective"] == name] for name in ("distilled", "cross_entropy", "unigram")}
    if not all(by.values()):
        return "Not measured yet: `python -m benchmarks.quickstart` writes the figures that stand here."
    texts = {(row["held_out_sha256"], row["eval_tokens"], row["steps"]) for row in rows}
    if len(texts) != 1:
        sys.exit(f"{path} has rows of {len(texts)} held-out texts or numbers of steps; a table compares one")
    table = [
        ("teacher", by["distilled"], "teacher"),
        ("student before", by["distilled"], "before"),
        ("token frequencies (unigram)", by["unigram"], "after"),
        ("student, cross entropy alone", by["cross_entropy"], "after"),
        ("**student, distilled**", by["distilled"], "after"),
    ]
    lines = ["| | KL to the teacher (nats) | top-1 agreement | perplexity |", "|:--|--:|--:|--:|"]
    lines += [f"| {name} | {' | '.join(_cells(of, when))} |" for name, of, when in table]
    return "\n".join([*lines, "", _verdict(by), "", _measured_on(by["distilled"], *texts.pop())])


def _cells(rows: Rows, when: str) -> list[str]:
    def cell(figure: str, factor: float = 1.0, unit: str = "") -> str:
        values = [factor * row[f"{figure}_{when}"] for row in rows if f"{figure}_{when}" in row]
        return amount(values, unit) if values else "–"

    return [cell("kl"), cell("agreement", 100.0, "%"), cell("perplexity")]


def _verdict(by: Mapping[str, Rows]) -> str:
    """Return whether distillation's KL lies below the others', intervals apart: said either way."""
    (mean, half), *others = (interval([row["kl_after"] for row in rows]) for rows in by.values())
    apart = all(mean + half < other - width for other, width in others)
    return (
        f"The distilled student's KL is {'' if apart else 'not '}below that of both others "
        f"{'with' if apart else 'by more than'} their 95 % intervals{' apart' if apart else ''}."
    )


def _measured_on(rows: Rows, held_out: str, eval_tokens: float, steps: int) -> str:
    def named(*names: str) -> str:
        seen = {tuple(row["environment"].get(name) for name in names): None for row in rows}
        return " and ".join(" ".join(map(str, values)) for values in seen)

    versions = ", ".join(f"{name} {named(name)}" for name in ("python", "kdjax", "jax", "flax", "optax"))
    seeds = f"{len(rows)} seeds" if len(rows) > 1 else "one seed"
    return (
        f"Mean and 95 % interval (Student's t) over {seeds} of the data's order, {steps} steps each, measured on "
        f"{eval_tokens:,.0f} held-out tokens with SHA-256 `{held_out}`. A distilled run took "
        f"{amount([row['seconds'] for row in rows])} seconds on {named('devices', 'platform')} device "
        f"({named('device')}, {named('cpu_cores')} cores); {versions}; commit {named('commit')}."
    )


def console(results: Path) -> str:
    """Return what a real run printed, progress lines but the first and last ones left out."""
    path = results / "quickstart.txt"
    if not path.exists():
        return "Not recorded yet: `kdjax train configs/quickstart.py` prints what stands here."
    lines = [line.rstrip() for line in path.read_text().strip().splitlines()]
    return "\n".join(["```text", *_thinned(lines), "```"])


def _thinned(lines: Iterable[str]) -> Iterable[str]:
    for is_step, group in itertools.groupby(lines, lambda line: re.match(r"step \d+/", line) is not None):
        found = list(group)
        yield from found if not is_step or len(found) < 6 else [*found[:3], "…", found[-1]]


BLOCKS: dict[str, Callable[[Path], str]] = {"console": console, "quickstart": quickstart}
"""Name of a pair of markers -> what stands between them."""


def render(text: str, results: Path = RESULTS) -> str:
    """Return the README with every block made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        parts = re.split(f"{begin}.*?{end}", text, flags=re.DOTALL)
        if len(parts) != 2:
            sys.exit(f"README.md has {len(parts) - 1} blocks {begin} … {end}, wanted 1")
        text = f"{parts[0]}{begin}\n{make(results)}\n{end}{parts[1]}"
    return text


LOSS_BLOCKS: dict[str, Callable[[Path], str]] = {
    "loss table": lambda results: loss_table.markdown(harness.read(results / "loss.jsonl")),
    "loss compiled": lambda results: loss_compiled.markdown(harness.read(results / "loss_compiled.jsonl")),
}
"""The same for the page of losses."""

MODEL_BLOCKS: dict[str, Callable[[Path], str]] = {
    "models": lambda results: models.markdown(harness.read(results / "models.jsonl")),
    "kinds": lambda results: kinds.markdown(harness.read(results / "kinds.jsonl")),
}
"""The same for the page of models."""

STUDENT_BLOCKS: dict[str, Callable[[Path], str]] = {
    "students": lambda results: students.markdown(harness.read(results / "students.jsonl")),
}
"""The same for the page of students."""

GENERATION_BLOCKS: dict[str, Callable[[Path], str]] = {
    "generate": lambda results: generate.markdown(harness.read(results / "generate.jsonl")),
}
"""The same for the page of generation."""


MEMORY_BLOCKS: dict[str, Callable[[Path], str]] = {
    "memory": lambda results: memory.markdown(harness.read(results / "memory.jsonl")),
}
"""The same for the page of memory."""

PROMPT_BLOCKS: dict[str, Callable[[Path], str]] = {
    "prompts": lambda results: prompts.markdown(harness.read(results / "prompts.jsonl")),
    "prompt_distill": lambda results: prompt_distill.markdown(harness.read(results / "prompt_distill.jsonl")),
    "gist": lambda results: gist.markdown(harness.read(results / "gist.jsonl")),
}
"""The same for the page of prompts."""


SEARCH_BLOCKS: dict[str, Callable[[Path], str]] = {
    "search": lambda results: search.markdown(harness.read(results / "search.jsonl")),
    "pipeline": lambda results: pipeline.markdown(harness.read(results / "pipeline.jsonl")),
}
"""The same for the page of prompt search."""

EFFECT_BLOCKS: dict[str, Callable[[Path], str]] = {
    "effect": lambda results: effect.markdown(harness.read(results / "effect.jsonl")),
}
"""The same for the page on a prompt's effect."""

CASE_STUDY_BLOCKS: dict[str, Callable[[Path], str]] = {
    "arms": lambda results: arms.markdown(harness.read(results / "arms.jsonl")),
    "knowledge": lambda results: knowledge.markdown(harness.read(results / "knowledge.jsonl")),
    "screening": lambda results: screening.markdown(harness.read(results / "screening.jsonl")),
}
"""The same for the case study."""


def render_page(blocks: Mapping[str, Callable[[Path], str]], text: str, results: Path = RESULTS) -> str:
    """Return a page with the blocks made anew that it has markers for."""
    for name, make in blocks.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, found, rest = text.partition(begin)
        if found and end not in rest:
            sys.exit(f"a page has {begin}, but no {end} after it")
        if found:
            text = f"{head}{begin}\n{make(results)}\n{end}{rest.partition(end)[2]}"
    return text


TEACHER_BLOCKS: dict[str, Callable[[Path], str]] = {
    "teachers": lambda results: runs.markdown(teachers.STUDY, harness.read(results / "teachers.jsonl")),
    "cache": lambda results: cache.markdown(harness.read(results / "cache.jsonl")),
    "answers": lambda results: runs.markdown(answers.STUDY, harness.read(results / "answers.jsonl")),
    "tokenizers": lambda results: runs.markdown(tokenizers.STUDY, harness.read(results / "tokenizers.jsonl")),
}
"""The same for the page of what a teacher says."""

SCALING_BLOCKS: dict[str, Callable[[Path], str]] = {
    "scaling": lambda results: scaling.markdown(harness.read(results / "scaling.jsonl")),
}
"""The same for the page of several devices."""

BENCHMARK_BLOCKS: dict[str, Callable[[Path], str]] = {
    "step": lambda results: step.markdown(harness.read(results / "step.jsonl")),
    "peers": lambda results: peers.markdown(harness.read(results / "peers.jsonl")),
    "quality": lambda results: quality_table.markdown(harness.read(results / "quality.jsonl"), interval),
    "teacher": lambda results: teacher.markdown(harness.read(results / "teacher.jsonl")),
    "data": lambda results: data.markdown(harness.read(results / "data.jsonl")),
    "checkpoint": lambda results: checkpoint.markdown(harness.read(results / "checkpoint.jsonl")),
    "start": lambda results: start.markdown(harness.read(results / "start.jsonl")),
}
"""The same for the benchmarks' own page."""

PAGES: dict[Path, Callable[[str], str]] = {
    README: render,
    LOSSES: partial(render_page, LOSS_BLOCKS),
    MODELS: partial(render_page, MODEL_BLOCKS),
    STUDENTS: partial(render_page, STUDENT_BLOCKS),
    GENERATION: partial(render_page, GENERATION_BLOCKS),
    MEMORY: partial(render_page, MEMORY_BLOCKS),
    PROMPTS: partial(render_page, PROMPT_BLOCKS),
    SEARCH: partial(render_page, SEARCH_BLOCKS),
    EFFECT: partial(render_page, EFFECT_BLOCKS),
    CASE_STUDY: partial(render_page, CASE_STUDY_BLOCKS),
    TEACHERS: partial(render_page, TEACHER_BLOCKS),
    SCALING: partial(render_page, SCALING_BLOCKS),
    BENCHMARKS: partial(render_page, BENCHMARK_BLOCKS),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages that are there, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    stale = 0
    for page, make in PAGES.items():
        before = page.read_text() if page.exists() else ""
        after = make(before) if before else ""
        if options.check and before != after:
            stale = 1
            print(f"{page.name} is not what the results say: run python -m benchmarks.readme", file=sys.stderr)
        elif before != after:
            page.write_text(after)
    return stale


if __name__ == "__main__":
    harness.leave(main)
