"""The progress line and the closing table."""

import io
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kdjax.console import Progress, amount, comparison, count, duration, final_table, percent, visible

SUMMARY = {
    "perplexity_teacher": 13.46,
    "perplexity_before": 693_842.1,
    "perplexity_after": 64.46,
    "kl_before": 10.85,
    "kl_after": 1.566,
    "agreement_before": 0.003,
    "agreement_after": 0.396,
    "parameters_teacher": 134_515_008,
    "parameters_student": 77_987_520,
    "tokens_per_second_teacher": 2570.4,
    "tokens_per_second_student": 5480.2,
    "prompt": "A list [red]is[/red]",
    "continuations": {
        "teacher": " a way to make a list. " * 8,
        "student before": " of\x1b[31m of\x9b of\u202e [bold]of[/bold]",
        "student after": " a list\n\nof lists",
    },
}
PRETRAINED = {"perplexity_before": 49_021.0, "perplexity_after": 92.24, "parameters_student": 1_234_567}


def plain(steps=60, **options):
    file = io.StringIO()
    return file, Progress(steps, lambda left: 2.0 * left, console=Console(file=file, width=80), **options)


@pytest.mark.parametrize(
    "show, value, text",
    [
        (amount, 1.5664, "1.566"),
        (amount, 44.126, "44.13"),
        (amount, 252.33, "252.3"),
        (amount, 51_234.4, "51,234"),
        (amount, -0.5, "-0.500"),
        (amount, math.nan, "–"),
        (amount, None, "–"),
        (amount, "12", "–"),
        (amount, True, "–"),
        (amount, 10**400, "–"),
        (percent, 0.396, "39.6 %"),
        (count, 134_515_008, "134.5 M"),
        (count, 12_345, "12,345"),
        (duration, 134.2, "2:14"),
        (duration, 3734, "1:02:14"),
        (duration, math.inf, "–"),
    ],
)
def test_formats(show, value, text):
    assert show(value) == text


@given(st.text())
def test_visible_text_has_no_control_characters_and_can_be_encoded(text):
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) in {"Cc", "Cs"} and c not in "\n\t"]
    shown.encode("utf-8")
    if text.isascii() and text.isprintable():
        assert shown == text


def test_plain_lines_come_every_few_seconds_and_at_the_last_step():
    now = [0.0]
    file, progress = plain(clock=lambda: now[0], every_seconds=5.0)
    for step in range(1, 61):
        now[0] += 0.5
        progress.write(step, {"loss": 60.0 / step, "ce": 1.0, "kd": 2.0, "tokens_per_second": 1950.4})
    progress.close()
    lines = file.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == [f"step {n}" for n in (1, 11, 21, 31, 41, 51, 60)]
    assert lines[1] == "step 11/60  loss 5.455  ce 1.000  kd 2.000  1,950 tokens/s  eta 1:38"
    assert lines[-1].endswith("in 0:30")


def test_a_plain_line_says_what_is_known_and_no_more():
    file, progress = plain()
    progress.write(1, {"loss": math.nan, "ce": 3.0, "tokens_per_second": math.nan, "skipped": 1})
    assert file.getvalue() == "step 1/60  loss nan  skipped 1  eta 1:58\n"


def test_an_evaluation_gets_a_line_of_its_own_below_80_columns():
    file, progress = plain(clock=lambda: 0.0)
    progress.write(1, {"loss": 2.0})
    progress.write(
        10_000, {"eval_kl": 10.8512, "eval_agreement": 0.396, "eval_perplexity": 693_842.0, "eval_tokens": 5}
    )
    line = file.getvalue().splitlines()[1]
    assert line == "step 10,000 held out: KL to teacher 10.85  agreement 39.6 %  perplexity 693,842" and len(line) < 80


def test_the_live_line_fits_one_row_and_stays_when_closed():
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    progress = Progress(60, lambda left: 0.5 * left, start=20, console=console)
    progress.write(60, {"loss": 1.5, "ce": 4.0, "kd": 1.0, "tokens_per_second": 1950.0})
    progress.close()
    shown = file.getvalue()
    assert "step 20/60" in shown and "compiling" in shown
    last = shown.split("\x1b[2K")[-1].split("\n")[0]
    assert last.startswith("step 60/60 ━") and last.count("━") >= 6 and len(last) <= 80
    assert "loss 1.500  ce 4.000  kd 1.000  1,950 tokens/s  in 0:00" in last
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def table(summary, **options):
    file = io.StringIO()
    Console(file=file, width=80, **options).print(final_table(summary))
    return file.getvalue()


def test_the_table_has_all_figures_within_80_columns():
    text = table(SUMMARY)
    assert max(map(len, text.splitlines())) <= 80
    rows = {line[:14].strip(): line[14:].split() for line in text.splitlines()[:8]}
    assert rows["teacher"] == ["13.46", "–", "–", "134.5", "M", "2,570"]
    assert rows["student before"] == ["693,842", "10.85", "0.3", "%", "78.0", "M", "5,480"]
    assert rows["student after"] == ["64.46", "1.566", "39.6", "%", "78.0", "M", "5,480"]


def test_text_of_strangers_is_shown_as_it_is():
    text = table(SUMMARY)
    assert "[red]is[/red]" in text and "[bold]of[/bold]" in text
    assert "\\x1b[31m of\\x9b of\\u202e" in text and "\x1b" not in text
    assert table(SUMMARY, force_terminal=True, color_system=None).count("\x1b[31m") == 0


def test_pre_training_has_no_teacher_and_no_empty_column():
    headings, rows = comparison(PRETRAINED)
    assert headings == ["", "perplexity", "parameters"]
    assert rows == [["student before", "49,021", "1.2 M"], ["student after", "92.24", "1.2 M"]]


def test_an_empty_summary_prints_nothing():
    assert table({}).strip() == ""
