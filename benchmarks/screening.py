"""Which tasks a small model gains from worked examples on: zero-shot and few-shot, with and without calibration.

COMMAND: python -m benchmarks.screening       (about an hour of a CPU core; run again to go on)
         python -m benchmarks.screening --tasks "line compiles"       (a part of it)

A row of benchmarks/results/screening.jsonl is one task, number of worked examples and draw of them.
`python -m benchmarks.readme` puts the table into docs/case-study.md.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np

from benchmarks import harness, quick
from kdjax.data.python_docs import KINDS, documents
from kdjax.prompts.config import SpeakerConfig
from kdjax.prompts.local import open_local
from kdjax.prompts.score import Scoring, priors, weigh_labels
from kdjax.prompts.select import mean_interval
from kdjax.prompts.speaker import Speaker
from kdjax.prompts.tasks import TASKS, Candidate, Example

RESULTS = harness.RESULTS / "screening.jsonl"
MODEL = "smollm2-135m-instruct"
SHOTS, DRAWS, LEAST_GAIN = (0, 8, 16, 32), 5, 0.05
LETTERS = 100
"""Of an input, at most."""

Pairs = list[tuple[str, str]]
"""Inputs with their answers."""


def first_lines() -> list[tuple[str, str, str]]:
    """Return name, first line of the text and kind of each document whose line has three words or more."""
    rows = ((row["id"], row["text"].splitlines()[0][:LETTERS], KINDS[row["label"]]) for row in documents())
    return [row for row in rows if len(row[1].split()) >= 3]


def _kind() -> Pairs:
    return [(line, kind) for _, line, kind in first_lines() if kind in ("class", "function")]


def _name_kind() -> Pairs:
    rows = ((name.rpartition(".")[2], kind) for name, _, kind in first_lines())
    return [row for row in rows if row[1] in ("module", "class", "function")]


def _module() -> Pairs:
    wanted = ("asyncio", "email", "tkinter", "unittest")
    rows = ((line, name.partition(".")[0]) for name, line, _ in first_lines())
    return [row for row in rows if row[1] in wanted]


def _belongs() -> Pairs:
    rows = [(name.rpartition(".")[2], line) for name, line, kind in first_lines() if kind == "function"]
    rows = Random(1).sample(rows, len(rows))
    half = len(rows) // 2
    others = rows[half + 1 :] + rows[half : half + 1]
    true = [(f"{name}: {line}", "yes") for name, line in rows[:half]]
    return true + [
        (f"{name}: {line}", "no")
        for (name, own), (other, line) in zip(rows[half:], others, strict=True)
        if name != other and line != own
    ]


def _exception() -> Pairs:
    rows = ((name.rpartition(".")[2], line) for name, line, kind in first_lines() if kind == "class")
    return [(line, "error" if name.endswith(("Error", "Exception")) else "other") for name, line in rows]


def _valid() -> Pairs:
    """Return lines of some modules as they are, or with one sign left out at random so that they do not compile."""
    text = "\n".join(inspect.getsource(module) for module in (argparse, ast, json, shutil))
    lines = sorted({line.strip() for line in text.splitlines()})
    rng, rows = Random(1), Pairs()
    for line in (line for line in lines if 15 < len(line) < 70 and "(" in line and _compiles(line)):
        at = rng.choice([place for place, letter in enumerate(line) if not letter.isalnum() and letter != " "])
        broken = line[:at] + line[at + 1 :]
        rows.append((broken, "no") if len(rows) % 2 and not _compiles(broken) else (line, "yes"))
    return rows


def _compiles(text: str) -> bool:
    try:
        compile(text, "line", "exec")
    except SyntaxError:
        return False
    return True


SCREENED: dict[str, tuple[str, Callable[[], Pairs]]] = {
    "class or function, by docstring": ("Does this text document a class or a function?", _kind),
    "kind, by name": ("Is this the name of a module, a class or a function in Python?", _name_kind),
    "package, by docstring": ("Which Python package is this text from: asyncio, email, tkinter or unittest?", _module),
    "text belongs to name": ("Does the text describe the function of that name? Answer yes or no.", _belongs),
    "error or other class, by docstring": (
        "Is the class that this documents an error? Say error or other.",
        _exception,
    ),
    "line compiles": ("Is this line valid Python? Answer yes or no.", _valid),
}
"""Name of a task -> instruction and all its inputs with answers."""


def balanced(pairs: Pairs) -> list[Example]:
    """Return as many examples of each label, in turns; an input that has two labels is left out."""
    times = Counter(given for given, _ in set(pairs))
    clear = sorted(pair for pair in set(pairs) if times[pair[0]] == 1)
    by: dict[str, list[Example]] = {label: [] for label in sorted({label for _, label in clear})}
    for given, label in Random(0).sample(clear, len(clear)):
        by[label].append(Example(given, label))
    return [example for group in zip(*by.values(), strict=False) for example in group]


def measure(speaker: Speaker, name: str, shots: int, draw: int, tests: int) -> harness.Row:
    """Return of each test example whether the likeliest label is right (1 or 0), plain and calibrated."""
    instruction, make = SCREENED[name]
    examples = balanced(make())
    tests = min(tests, len(examples) - max(SHOTS))
    asked, pool = examples[:tests], examples[tests:]
    labels = tuple(sorted({example.answer for example in examples}))
    scoring = Scoring(TASKS["classification"], labels=labels)
    candidate = Candidate(instruction, tuple(Random(draw).sample(pool, shots)))
    (prior,) = priors(speaker, scoring, [candidate])
    log_probs_JY = np.stack([x for x, _ in weigh_labels(speaker, scoring, [(candidate, one) for one in asked])])
    right_J = np.array([labels.index(one.answer) for one in asked])
    found = {"plain": log_probs_JY, "calibrated": log_probs_JY - np.array(prior.log_probs)}
    scores = {way: (values.argmax(axis=1) == right_J).astype(int).tolist() for way, values in found.items()}
    majority = float(np.bincount(right_J).max() / len(right_J))
    return {"task": name, "shots": shots, "draw": draw, "labels": labels, "majority": majority} | scores


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/case-study.md; tasks that are not measured whole are left out."""
    absent, lines = (
        [],
        ["| task | labels | majority | answers | " + " | ".join(f"{n} shots" for n in SHOTS) + " | gain | |"],
    )
    lines += ["|:--|--:|--:|:--|" + "--:|" * len(SHOTS) + "--:|:--|"]
    for name in SCREENED:
        own = [row for row in rows if row["task"] == name]
        if len(own) < 1 + DRAWS * (len(SHOTS) - 1):
            absent.append(name)
            continue
        found = {
            way: {n: np.array([row[way] for row in own if row["shots"] == n], float) for n in SHOTS}
            for way in ("plain", "calibrated")
        }
        bare = max((arms[0][0] for arms in found.values()), key=np.mean)
        for way, arms in found.items():
            best = max(SHOTS[1:], key=lambda n: arms[n].mean())
            gain = mean_interval(arms[best].mean(axis=0) - bare, 0)
            cells = [name, str(len(own[0]["labels"])), _percent(own[0]["majority"]), way]
            cells += [_cell(mean_interval(arms[n].mean(axis=0), 0), arms[n].mean(axis=1)) for n in SHOTS]
            cells += [_cell(gain, np.zeros(1)), "used" if gain[1] > LEAST_GAIN else "not used"]
            lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        return "Not measured yet: `python -m benchmarks.screening` writes the figures that stand here."
    here = rows[-1]["environment"]
    about = (
        f"{MODEL}; {len(rows[0]['plain'])} test examples; {harness.machine(here)}; commit {here.get('commit', '?')}."
    )
    short = f" Not measured whole yet: {'; '.join(absent)}." if absent else ""
    return "\n".join([*lines, "", f"{about}{short}"])


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _cell(found: tuple[float, float, float], of_draw: np.ndarray) -> str:
    mean, low, high = found
    spread = f"; draws {100 * of_draw.min():.0f}–{100 * of_draw.max():.0f}" if len(of_draw) > 1 else ""
    return f"{_percent(mean)} ({100 * low:.0f} to {100 * high:.0f}{spread})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, row by row."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--tasks", nargs="+", default=list(SCREENED), choices=list(SCREENED))
    parser.add_argument("--tests", type=int, default=100, help="test examples of each task")
    options = parser.parse_args(arguments)
    done = {(row["task"], row["shots"], row["draw"]) for row in harness.kept(options)}
    shots, draws, tests = (SHOTS[:2], 1, 6) if options.quick else (SHOTS, DRAWS, options.tests)
    plan = [(name, n, draw) for name in options.tasks for n in shots for draw in range(draws if n else 1)]
    left = [case for case in plan if case not in done]
    with tempfile.TemporaryDirectory() as directory:
        source = quick.model(Path(directory)) if options.quick else MODEL
        speaker, environment = open_local(SpeakerConfig(source, chat=False)), harness.environment()
        progress = harness.Progress(sum(1 + case[1] for case in left), None)
        for case in left:
            began = time.monotonic()
            row: harness.Row = measure(speaker, *case, tests)
            harness.tell(options, row | {"seconds": time.monotonic() - began}, environment)
            said = f"{case}: {np.mean(row['plain']):.2f}, calibrated {np.mean(row['calibrated']):.2f}"
            progress.advance(1 + case[1], said)
    return 0


if __name__ == "__main__":
    harness.leave(main)
