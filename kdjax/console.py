"""What a run shows on the console: the progress line while it trains, and the table when it is done.

Text of models and prompts comes from strangers: it is never read as markup, and its control characters are made
visible.
"""

from __future__ import annotations

import math
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box, progress
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

MISSING = "–"


def finite(value: Any) -> float | None:
    """Return a finite number as a float, anything else as None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= sys.float_info.max else None


def amount(value: Any) -> str:
    """Return a number with as many decimals as one reads: ``1.534``, ``44.13``, ``252.3``, ``51,234``."""
    number = finite(value)
    if number is None:
        return MISSING
    size = abs(number)
    decimals = next((n for n, limit in ((3, 10), (2, 100), (1, 1000)) if size < limit), 0)
    return f"{number:,.{decimals}f}"


def small(value: Any) -> str:
    """Return a number that may be far below 1 by two digits: ``0.00034``."""
    number = finite(value)
    return MISSING if number is None else f"{number:.2g}"


def percent(value: Any) -> str:
    """Return a share as ``39.6 %``."""
    number = finite(value)
    return MISSING if number is None else f"{100 * number:.1f} %"


def count(value: Any) -> str:
    """Return a whole number: ``134.5 M``, or ``12,345`` below a million."""
    number = finite(value)
    if number is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:,.0f}"


def duration(seconds: Any) -> str:
    """Return seconds as ``2:14`` or ``1:02:14``."""
    number = finite(seconds)
    if number is None:
        return MISSING
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def visible(text: Any) -> str:
    """Return text whose control characters, lone surrogates and text-direction marks are written as escapes."""
    return "".join(c.encode("unicode_escape").decode() if _is_hidden(c) else c for c in str(text))


def _is_hidden(c: str) -> bool:
    is_direction = unicodedata.bidirectional(c) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return is_direction or (unicodedata.category(c) in {"Cc", "Cs"} and c not in "\n\t")


EVALUATION = {
    "eval_kl": ("KL to teacher", amount),
    "eval_agreement": ("agreement", percent),
    "eval_perplexity": ("perplexity", amount),
    "eval_features": ("inner layers", amount),
}
"""What is shown of an evaluation's row: label and format."""


FIRST_STEP = (
    "first step after {first_step_seconds:.1f} s, {compiled_seconds:.1f} s of it compiling {compiled_programs:.0f} "
    "programs, {compiled_cached:.0f} of them kept from before; the teacher has {teachers_flops:.0%} of its FLOPs"
)


class Progress:
    """A writer for people: a live line on a terminal; elsewhere a plain line every few seconds and at the last step."""

    def __init__(
        self,
        steps: int,
        eta: Callable[[int], float],
        *,
        start: int = 0,
        console: Console | None = None,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._eta, self._every, self._clock = steps, eta, every_seconds, clock
        self._console = console or Console()
        self._began, self._printed = clock(), -math.inf
        self._live = self._start_line(start) if self._console.is_interactive else None

    def _start_line(self, start: int) -> progress.Progress:
        """Return the running live line; its one task is 0."""

        def text(fmt: str) -> progress.TextColumn:
            return progress.TextColumn(fmt, table_column=Column(no_wrap=True, overflow="ellipsis"))

        bar = progress.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6))
        live = progress.Progress(
            text("step {task.completed:,}/{task.total:,}"),
            bar,
            text("{task.fields[now]}"),
            console=self._console,
            expand=True,
        )
        live.add_task("", total=self._steps, completed=start, now="compiling …")
        live.start()
        return live

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Show the row."""
        if "first_step_seconds" in row:
            self._print(FIRST_STEP.format(**row))
        if "loss" in row:
            self._show_step(step, row)
        if any(name in row for name in EVALUATION):
            figures = [f"{label} {show(row[name])}" for name, (label, show) in EVALUATION.items() if name in row]
            self._print(f"step {step:,} held out: " + "  ".join(figures))

    def _show_step(self, step: int, row: Mapping[str, Any]) -> None:
        now = self._clock()
        is_last = step >= self._steps
        names = ("loss", "ce", "kd") if "kd" in row else ("loss",)
        parts = [f"{name} {row[name]:.3f}" for name in names if name in row]
        if finite(row.get("tokens_per_second")):
            parts.append(f"{count(row['tokens_per_second'])} tokens/s")
        if finite(row.get("mfu")):
            parts.append(f"MFU {row['mfu']:.1%}")
        if row.get("skipped"):
            parts.append(f"skipped {row['skipped']:.0f}")
        left = f"in {duration(now - self._began)}" if is_last else f"eta {duration(self._eta(self._steps - step))}"
        line = "  ".join([*parts, left])
        if self._live:
            self._live.update(progress.TaskID(0), completed=step, now=line, refresh=is_last)
        elif is_last or now - self._printed >= self._every:
            self._printed = now
            self._print(f"step {step:,}/{self._steps:,}  {line}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the live line; what it showed last stays."""
        if self._live:
            self._live.stop()


Figures = Mapping[str, tuple[str, Callable[[Any], str]]]

FIGURES: Figures = {
    "perplexity": ("perplexity_{}", amount),
    "KL to teacher\n(nats)": ("kl_{}", amount),
    "inner\nlayers": ("features_{}", amount),
    "top-1\nagreement": ("agreement_{}", percent),
    "parameters": ("parameters_{}", count),
    "tokens/s": ("tokens_per_second_{}", count),
}
"""Columns of the closing table: heading, key of the summary with a place for whose it is, format."""


def comparison(summary: Mapping[str, Any], figures: Figures = FIGURES) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows (teacher, student before, student after) of a summary's figures, as text.

    Rows and columns of which nothing is known are left out: a pre-trained model has no teacher.
    """
    rows = {
        "teacher": ("teacher",),
        "student before": ("before", "student"),
        "student after": ("after", "student"),
    }

    def cell(key: str, show: Callable[[Any], str], of: tuple[str, ...]) -> str:
        return next((show(summary[key.format(who)]) for who in of if key.format(who) in summary), MISSING)

    table = [[name, *(cell(*figure, of) for figure in figures.values())] for name, of in rows.items()]
    table = [row for row in table if set(row[1:]) != {MISSING}]
    headings = ["", *figures]
    known = [i for i in range(len(headings)) if i == 0 or any(row[i] != MISSING for row in table)]
    return [headings[i] for i in known], [[row[i] for i in known] for row in table]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of text, figures to the right."""
    found = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in headings:
        found.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in rows:
        found.add_row(*map(Text, row))
    return found


STUDENT: Figures = {
    "layers": ("layers", count),
    "encoder layers": ("encoder_layers", count),
    "width": ("width", count),
    "heads": ("heads", count),
    "kv heads": ("kv_heads", count),
    "mlp": ("mlp_width", count),
    "vocabulary": ("vocab_size", count),
    "parameters": ("parameters", count),
    "MB": ("bytes", lambda size: amount(size / 1e6)),
    "KL to teacher (nats)": ("kl", amount),
    "top-1 agreement": ("agreement", percent),
    "perplexity": ("perplexity", amount),
    "1 − cosine to teacher": ("features", amount),
}
"""Rows of the table of a cut student: what stands before them, key, format."""


def student_table(models: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Return the table of teacher, student before training, and a random student of its shape; rows that are known."""
    rows = [
        [name, *(show(model[key]) if key in model else MISSING for model in models.values())]
        for name, (key, show) in STUDENT.items()
        if any(key in model for model in models.values())
    ]
    return table(["", *models], rows)


def final_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return the closing table: teacher, student before and after; then how each continued the same prompt."""
    figures = table(*comparison(summary))
    if figures.rows:
        figures.rows[-1].style = "bold"
    said = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 1, 0))
    said.add_column(style="dim", no_wrap=True)
    said.add_column(overflow="fold")
    texts = summary.get("continuations") or {}
    for who, text in ({"prompt": summary.get("prompt", "")} | texts if texts else {}).items():
        said.add_row(Text(visible(who)), Text(visible(text).strip()))
    tables = [part for shown in (figures, said) if shown.row_count for part in (shown, "")]
    return Group(*tables, *map(Text, recovered(summary)))


RECOVERED = {
    "recovered": "the teacher's answers",
    "recovered_swapped": "these behind another prompt's gist",
    "recovered_by_gist": "these, own gist less another's",
    "recovered_own": "the student's own answers",
    "recovered_own_swapped": "these behind another prompt's gist",
    "recovered_own_by_gist": "these, own gist less another's",
}
"""Name of a share in summary.json -> what it was measured on."""


def recovered(summary: Mapping[str, Any]) -> list[str]:
    """Return sentences on how much of a prompt's effect a student has without it, and what that saves."""
    said = []
    for key, where in RECOVERED.items():
        if finite(summary.get(key)) is not None:
            low, high = map(percent, summary[f"{key}_interval"])
            prompts = count(summary[f"{key}_prompts"])
            said.append(
                f"recovered of the prompt: {percent(summary[key])} on {where} "
                f"(95 % interval {low} to {high}, {prompts} held-out prompts)"
            )
    if behaviour := summary.get("behaviour"):
        said.append("behaviour: " + ", ".join(f"{who} {percent(share)}" for who, share in behaviour.items()))
    if (forgetting := summary.get("forgetting")) and finite(forgetting.get("kl")) is not None:
        said.append(f"forgetting: {small(forgetting['kl'])} nats from the unprompted teacher on unrelated text")
    if saved := summary.get("saved"):
        said.append(
            f"saved per request: {count(saved['prompt_tokens'])} tokens of prompt beside the "
            f"{count(saved['request_tokens'])} that stay, {saved['cache_bytes'] / 1e6:.1f} MB of cache, "
            f"{saved['seconds_with'] - saved['seconds_without']:.2f} s to the first token here"
        )
    return said


def prompts_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return the table of a search's winner and its rivals on the examples to report on, and the winning prompt."""
    rows = []
    for key, name in PROMPTS.items():
        if found := summary["test"].get(key):
            rows.append([name, scored(found), scored(summary["gains"].get(key), sign="+")])
    headings = ["", f"{summary['measure']} (95 % interval)", "gain over it (95 % interval)"]
    figures = table(headings, rows)
    figures.rows[0].style = "bold"
    best, selection = summary["best"], summary["selection"]
    lines = (
        f"{summary['candidates']} candidates; {sum(summary['evaluations'].values()):,} evaluations of "
        f"{count(sum(summary['tokens'].values()))} tokens; {summary['examples']['test']} examples to report on",
        f"the winner scored {amount(selection['score'])} where it was selected ({selection['examples']} examples): "
        f"{amount(summary['gap'])} too much",
        visible(best["text"]) + (f"\n(and {best['shots']} worked examples)" if best["shots"] else ""),
    )
    return Group(figures, "", *(Text(line) for line in lines))


PROMPTS = {
    "best": "the winner",
    "random": "a candidate at random",
    "first": "the first candidate",
    "few_shot": "examples selected alone",
    "commonest": "always the commonest label",
}
"""Rows of the table of a search: key of the summary, name."""


def pipeline_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return the table of a pipeline: scores with the prompt, without it, and distilled; and what that saves."""
    rows = [
        [name, scored(summary["test"].get(key)), scored(summary["gains"].get(key), sign="+")]
        for key, name in STAGES.items()
    ]
    figures = table(["", f"{summary['measure']} (95 % interval)", "gain (95 % interval)"], rows)
    figures.rows[-1].style = "bold"
    return Group(figures, "", *map(Text, recovered(summary["distil"])))


STAGES = {"prompted": "with the prompt", "unprompted": "without it", "distilled": "distilled, without it"}
"""Rows of the table of a pipeline: key of the summary, name."""


def scored(found: Mapping[str, Any] | None, sign: str = "") -> str:
    """Return a score with its interval; a sign before one that is above 0."""
    if found is None:
        return MISSING
    sign = sign if found["score"] > 0 else ""
    return f"{sign}{amount(found['score'])} ({amount(found['low'])} to {amount(found['high'])})"


KEPT = {
    "topk": "the {picks} likeliest entries of a token at temperature {temperature:g}, log-probabilities in {bits} bits",
    "sampled": "{picks} draws a token at temperature {temperature:g}, log-probabilities in {bits} bits",
    "hidden": "the last hidden state, {bits} bits a number",
}
"""Kind of a cache -> what is kept."""


def cache_table(found: Mapping[str, Any]) -> RenderableType:
    """Return what a cache holds, a line each, and what is wrong with it."""
    kept, settings = found["kept"]["train"], found["settings"]
    size, each = found["bytes"] / 1e6, found["bytes_per_token"]
    broken = ", ".join(found["damaged"])
    lines = {
        "teacher": ", computed in ".join(settings[x] for x in ("teacher", "teacher_dtype") if x in settings),
        "kept": KEPT[kept["kind"]].format(**kept),
        "rows": f"{count(found['rows'])} of training, {count(found['held_out_rows'])} held out",
        "tokens": f"{count(found['tokens'])} that are compared, {percent(found['fill'])} of the places",
        "on disk": f"{size:,.1f} MB in {found['files']} files, {each:.1f} bytes a token",
        "largest error": f"{found['largest_error']:.2g} of what was said",
        "whole": f"no: {broken}; run `kdjax label` again, which writes them anew"
        if broken
        else "yes, by its checksums",
    }
    if "verified_rows" in found:
        worst, rows = found["largest_difference"], count(found["verified_rows"])
        others = count(found["tokens_of_other_entries"])
        lines["asked anew"] = (
            f"{rows} rows; what it says differs by {worst:.2g} at most, other entries at {others} tokens"
        )
    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, text in lines.items():
        shown.add_row(Text(name), Text(visible(text)))
    return shown
