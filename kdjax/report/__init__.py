"""One run, or several compared, as one HTML page that needs nothing beside itself.

Only a run directory's config.json, metrics.jsonl and summary.json are read. Their text comes from strangers: all of
it is escaped, control characters are made visible, and the page forbids scripts and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdjax import console
from kdjax.console import amount, comparison
from kdjax.errors import UserError
from kdjax.report import words
from kdjax.report.page import fill
from kdjax.report.plots import plots, swatch
from kdjax.report.run import Run, labels, load_run


def default_out(runs: Sequence[Path]) -> Path:
    """Return where a report goes: into the run it is of; for several runs, into the working directory."""
    return Path(runs[0]) / "report.html" if len(runs) == 1 else Path("report.html")


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page about one run or several compared, and return its path.

    Raises:
        UserError: no run, a path that is no run directory, or an `out` that cannot be written.
    """
    if not runs:
        raise UserError("no run to report on; wanted one run directory or several: kdjax report RUN [RUN…]")
    found = list({Path(path).resolve(): load_run(Path(path)) for path in runs}.values())
    page = _page_of_one(found[0]) if len(found) == 1 else _page_of_several(found)
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error.strerror}; name another file") from error
    return Path(out)


def _page_of_one(run: Run) -> str:
    figures = {**console.FIGURES, "cross entropy\n(nats)": ("ce_{}", amount)}
    return fill(
        "run.html",
        run=run,
        words=words,
        table=comparison(run.summary, figures),
        plots=plots({"": (run.rows, run.summary)}),
    )


def _page_of_several(runs: Sequence[Run]) -> str:
    names = labels(runs)
    return fill(
        "runs.html",
        runs=dict(zip(names, runs, strict=True)),
        models=[words.what(run.config) for run in runs],
        held_out=words.held_out_texts(runs),
        figures=words.compared(runs),
        differences=words.differences([run.config for run in runs]),
        swatches=[swatch(i) for i in range(len(runs))],
        plots=plots({name: (run.rows, run.summary) for name, run in zip(names, runs, strict=True)}),
        said=[(name, *said) for name, run in zip(names, runs, strict=True) if (said := words.last_words(run.summary))],
        pretty=words.pretty,
    )
