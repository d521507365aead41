"""What a run directory says, read with patience: whatever is missing or damaged besides its config is a remark."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdjax import metrics
from kdjax.errors import UserError

CONFIG, SUMMARY = "config.json", "summary.json"
"""Names of files in a run directory."""


@dataclass(frozen=True)
class Run:
    """The three files of a run directory that a report is made of.

    Attributes:
        path: as it was given.
        config: the resolved config.
        rows: of metrics.
        summary: its figures; empty where there is none.
        problems: sentences about what could not be read.
    """

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    problems: list[str]

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name


def load_run(path: Path) -> Run:
    """Return what the run directory `path` says.

    Raises:
        UserError: it is no run directory.
    """
    try:
        config = _json_object(path / CONFIG)
    except OSError:
        raise UserError(f"{path} is no run directory: no {CONFIG} in it; give the --run-dir of kdjax train") from None
    except ValueError as error:
        raise UserError(f"{path} is no run directory: its {CONFIG} is damaged ({error})") from None
    problems: list[str] = []
    rows = _rows(path, problems)
    return Run(path, config, rows, _summary(path, rows, problems), problems)


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        rows = metrics.read(path / metrics.METRICS)
    except UserError as error:
        problems.append(f"No curves: {error}.")
        return []
    if not rows:
        problems.append(f"No curves: {metrics.METRICS} has no rows yet.")
    return rows


def _summary(path: Path, rows: list[dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    """Return the summary; until a run ends it holds what was known before the first step, and no `steps`."""
    try:
        summary = _json_object(path / SUMMARY) if (path / SUMMARY).exists() else {}
    except (OSError, ValueError) as error:
        problems.append(f"No final figures: {path / SUMMARY} is damaged ({error}).")
        return {}
    if "steps" not in summary:
        last = f" at step {rows[-1]['step']:,}" if rows else ""
        problems.append(f"No final figures: the run is still going, or was stopped{last}; kdjax train {path} goes on.")
    return summary


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"wanted a JSON object, got {str(value)[:40]!r}")
    return value


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: its directory's, or the whole path where two directories have one name."""
    shared = Counter(run.name for run in runs)
    return [str(run.path) if shared[run.name] > 1 else run.name for run in runs]
