"""The door: one subcommand, one function. Bad input becomes one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from kdjax import __version__, commands
from kdjax.arguments import (
    add_cache,
    add_config,
    add_generate,
    add_label,
    add_launch,
    add_plan,
    add_profile,
    add_student,
)
from kdjax.cache import keep_compiled
from kdjax.commands import say
from kdjax.errors import UserError, did_you_mean

INTERRUPTED = 130
"""The exit code of a command that was ended by SIGINT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    speak_plainly()
    keep_compiled()
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except BrokenPipeError:  # whoever read the output has gone; Python would complain once more when it closes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except RuntimeError as error:  # XLA has no narrower class for this
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise
        say(f"the device is out of memory ({str(error).splitlines()[0]}); lower batch_size, or raise microbatches")
        return 2


def _run(given: list[str]) -> int:
    parser, known = _parser()
    if not given:
        raise UserError(f"which command? {', '.join(known)}; kdjax --help says what each does")
    if not given[0].startswith("-") and given[0] not in known:
        raise UserError(f"unknown command {given[0]!r}{did_you_mean(given[0], known)}")
    try:
        options, flags = parser.parse_known_args(given)
        if flags and options.run not in CONFIGURED:
            raise UserError(f"unknown argument {flags[0]!r}; see kdjax {options.command} --help")
        return options.run(options, flags) or 0
    except SystemExit as stop:  # after --help or --version
        return int(stop.code or 0)


class _OneLine(logging.Handler):
    """Shows each record of kdjax as one line on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show the record."""
        say(record.getMessage())


def speak_plainly() -> None:
    """Let kdjax's own remarks be seen, and not what libraries say to their developers; never fail on a character."""
    log = logging.getLogger("kdjax")
    log.handlers, log.propagate = [_OneLine()], False
    for name in ("train", "label", "student", "jobs", "answers", "search", "synthesis", "pipeline", "effect"):
        logging.getLogger(f"kdjax.{name}").setLevel(logging.INFO)
    for name in ("asyncio", "matplotlib"):  # a failed write's other tasks; a font cache that cannot be written
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    sys.unraisablehook = _pass_over_late_callbacks
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _pass_over_late_callbacks(caught: sys.UnraisableHookArgs) -> None:
    """Report what no code could catch, but for a write that failed and calls back to an event loop that has ended."""
    if str(caught.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(caught)


CONFIGURED = (
    commands.run_train,
    commands.run_answers,
    commands.run_label,
    commands.run_prompts,
    commands.run_pipeline,
    commands.run_effect,
    commands.run_plan,
)
"""Commands that take a config, and its fields as flags."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are those of the rest."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint as bad input."""
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser, and that of each command by name."""
    parser = _Parser("kdjax", description="Distil large language models into smaller and faster ones.")
    parser.add_argument("--version", action="version", version=f"kdjax {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace, list[str]], int | None], text: str
    ) -> argparse.ArgumentParser:
        # The help of train with a config is about the config's flags.
        command = parsers.add_parser(
            name, help=text, description=text, allow_abbrev=False, add_help=run not in CONFIGURED
        )
        command.set_defaults(run=run, print_help=command.print_help)
        return command

    train = add("train", commands.run_train, "distil, or pre-train where the config has no teacher; run again to go on")
    add_config(train)
    add_launch(train)
    add_profile(train)
    add_config(
        add("answers", commands.run_answers, "sample the teacher's answers that a config trains on; run again to go on")
    )
    label = add("label", commands.run_label, "keep what the teacher says of a config's data; run again to go on")
    add_label(label)
    add_launch(label)
    add_cache(add("cache", commands.run_cache, "say what a directory of `kdjax label` holds, and whether it is whole"))
    evaluate = add("evaluate", commands.run_evaluate, "measure a run's best saved step on its held-out text")
    evaluate.add_argument("run_dir", type=Path, metavar="RUN")
    evaluate.add_argument("--json", action="store_true", help="print JSON and nothing else")
    generate = add("generate", commands.run_generate, "continue a prompt with a run or a model")
    generate.add_argument("model", metavar="RUN_OR_MODEL")
    add_generate(generate)
    export = add("export", commands.run_export, "write a run's model as a Hugging Face directory")
    export.add_argument("model", metavar="RUN")
    export.add_argument("out", type=Path, metavar="OUT_DIR")
    add_student(add("student", commands.run_student, "cut a student out of a teacher, and measure it before training"))
    add_config(
        add("prompts", commands.run_prompts, "find the prompt that a model does a task best with; run again to go on")
    )
    add_config(add("pipeline", commands.run_pipeline, "find a prompt, distil it and evaluate; run again to go on"))
    add_config(
        add("effect", commands.run_effect, "say what a prompt changes on a task, and what it costs; run again to go on")
    )
    add_plan(
        add("plan", commands.run_plan, "say what a config's training step takes on a machine that need not be here")
    )
    report = add("report", commands.run_report, "write one HTML page on a run, or several compared")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    report.add_argument("--out", type=Path, help="by default RUN/report.html, or report.html for several")
    fetch = add("fetch", commands.run_fetch, "get a known model into the cache")
    fetch.add_argument("name")
    return parser, parsers.choices
