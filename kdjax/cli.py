"""The door: one subcommand, one function. Bad input becomes one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from kdjax import __version__
from kdjax.arguments import add_config, add_generate, add_launch, add_plan, add_profile, add_student
from kdjax.cache import keep_compiled
from kdjax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from kdjax.config import Config
    from kdjax.pipeline import PipelineConfig
    from kdjax.prompts.config import EffectConfig, PromptsConfig

C = TypeVar("C", "Config", "EffectConfig", "PipelineConfig", "PromptsConfig")

INTERRUPTED = 130
"""The exit code of a command that was ended by SIGINT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    _speak_plainly()
    keep_compiled()
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except BrokenPipeError:  # whoever read the output has gone; Python would complain once more when it closes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except RuntimeError as error:  # XLA has no narrower class for this
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise
        _say(f"the device is out of memory ({str(error).splitlines()[0]}); lower batch_size, or raise microbatches")
        return 2


def _run(given: list[str]) -> int:
    parser, commands = _parser()
    if not given:
        raise UserError(f"which command? {', '.join(commands)}; kdjax --help says what each does")
    if not given[0].startswith("-") and given[0] not in commands:
        raise UserError(f"unknown command {given[0]!r}{did_you_mean(given[0], commands)}")
    try:
        options, flags = parser.parse_known_args(given)
        if flags and options.run not in CONFIGURED:
            raise UserError(f"unknown argument {flags[0]!r}; see kdjax {options.command} --help")
        return options.run(options, flags) or 0
    except SystemExit as stop:  # after --help or --version
        return int(stop.code or 0)


def _say(text: str) -> None:
    print(f"kdjax: {' '.join(text.split())}", file=sys.stderr)


class _OneLine(logging.Handler):
    """Shows each record of kdjax as one line on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show the record."""
        _say(record.getMessage())


def _speak_plainly() -> None:
    """Let kdjax's own remarks be seen, and not what libraries say to their developers; never fail on a character."""
    log = logging.getLogger("kdjax")
    log.handlers, log.propagate = [_OneLine()], False
    for name in ("train", "student", "jobs", "answers", "search", "synthesis", "pipeline", "effect"):
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


def _configured(options: argparse.Namespace, flags: list[str], kind: type[C]) -> tuple[C, Path]:
    """Return the config that a command names, its flags applied, and the run directory; or print help, and leave."""
    from kdjax import config as configs

    if options.config is None and {"-h", "--help"} & set(flags):
        options.print_help()
        raise SystemExit
    if options.config is None:
        known = f": {', '.join(configs.recipes())}" if configs.recipes() else ""
        raise UserError(f"which config? A recipe{known}; or a config.json, or a run directory to go on with")
    command = f"kdjax {options.command} {options.config} [--run-dir DIR]"
    config = configs.override(configs.load(options.config, kind), flags, command)
    config = configs.with_prompt(config) if isinstance(config, configs.Config) else config
    default = Path(options.config) if Path(options.config).is_dir() else Path("runs") / config.name
    return config, options.run_dir or default


def _train(options: argparse.Namespace, flags: list[str]) -> int:
    import jax
    from rich.console import Console

    from kdjax.config import Config
    from kdjax.console import final_table
    from kdjax.distributed import Launch, join
    from kdjax.profile import span
    from kdjax.report import write_report
    from kdjax.train import Stopped, train

    traced = span(options.profile)
    config, directory = _configured(options, flags, Config)
    join(Launch(options.coordinator, options.processes, options.process, options.auto, options.timeout))
    speaks = jax.process_index() == 0  # one of a job's processes does; from the others only errors are heard
    for handler in logging.getLogger("kdjax").handlers if not speaks else ():
        handler.setLevel(logging.ERROR)
    try:
        summary = train(config, directory, traced)
    except Stopped as stopped:
        if speaks:
            _say(str(stopped))
        return stopped.exit_code
    if not speaks:
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(final_table(summary))
    for note in config.notes:
        console.print(note)
    console.print(f"report: {write_report([directory], directory / 'report.html')}")
    return 0


def _answers(options: argparse.Namespace, flags: list[str]) -> int:
    from kdjax.answers import write_answers
    from kdjax.config import Config
    from kdjax.lock import lock_run

    config, directory = _configured(options, flags, Config)
    if config.answers.by != "teacher":
        raise UserError("answers.by is 'data', so there is nothing to sample; set --answers.by teacher")
    directory.mkdir(parents=True, exist_ok=True)
    with lock_run(directory):
        print(write_answers(config, directory))
    return 0


def _prompts(options: argparse.Namespace, flags: list[str]) -> None:
    from rich.console import Console

    from kdjax.console import prompts_table
    from kdjax.prompts.config import PromptsConfig
    from kdjax.search import search
    from kdjax.synthesis import synthesise

    config, directory = _configured(options, flags, PromptsConfig)
    if config.make != "search":
        found = synthesise(config, directory)
        print(f"{found['kept']:,} prompts kept; dropped: {json.dumps(found['dropped'])}")
        print(f"prompts: {directory / 'prompts.jsonl'}")
        return
    summary = search(config, directory)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(prompts_table(summary))
    console.print(f"prompt: {directory / 'best.txt'}   all candidates: {directory / 'prompts.jsonl'}")


def _pipeline(options: argparse.Namespace, flags: list[str]) -> int:
    from rich.console import Console

    from kdjax.console import pipeline_table
    from kdjax.pipeline import SUMMARY, PipelineConfig, pipeline
    from kdjax.train import Stopped

    config, directory = _configured(options, flags, PipelineConfig)
    try:
        summary = pipeline(config, directory)
    except Stopped as stopped:
        _say(str(stopped))
        return stopped.exit_code
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(pipeline_table(summary))
    console.print(f"figures: {directory / SUMMARY}   model: {directory / 'distil'}")
    return 0


def _effect(options: argparse.Namespace, flags: list[str]) -> None:
    from rich.console import Console

    from kdjax.effect import EFFECT, effect
    from kdjax.prompts.config import EffectConfig
    from kdjax.report.effect import effect_table, write_effect

    config, directory = _configured(options, flags, EffectConfig)
    found = effect(config, directory)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(effect_table(found))
    page = write_effect(config.name, found, directory / "report.html")
    console.print(f"figures: {directory / EFFECT}   report: {page}")


def _plan(options: argparse.Namespace, flags: list[str]) -> None:
    from rich.console import Console

    from kdjax.config import Config
    from kdjax.plan.job import plan
    from kdjax.plan.page import markdown, plan_table, sweep_table

    config, _ = _configured(options, flags, Config)
    if options.topology is None:
        raise UserError("which machine? --topology v5e:16x16, gpu:8xH100 or cpu:8, for example")
    found = plan(config, options.topology, options.price, options.sweep)
    best = found[0] if options.sweep else found
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(markdown(f"Planned: {config.name}", [best]), "utf-8")
    if options.json:
        print(json.dumps({"plans": found} if options.sweep else found))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if options.sweep:
        console.print(sweep_table(found), "")
    console.print(plan_table(best))
    if options.report:
        console.print(f"report: {options.report}")


def _evaluate(options: argparse.Namespace, flags: list[str]) -> None:
    from rich.console import Console

    from kdjax.console import final_table
    from kdjax.jobs import evaluate_run
    from kdjax.summary import named_figures

    figures = evaluate_run(options.run_dir)
    if options.json:
        print((options.run_dir / "evaluation.json").read_text("utf-8"), end="")
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(final_table(named_figures(figures, "after")))
    console.print(f"{figures['tokens']:,.0f} held-out tokens, SHA-256 {figures['held_out_sha256'][:16]}")
    console.print(f"figures: {options.run_dir / 'evaluation.json'}")


def _generate(options: argparse.Namespace, flags: list[str]) -> None:
    from kdjax.jobs import generate_texts, read_prompts
    from kdjax.sampling import Sampling

    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    if not prompts:
        raise UserError("which prompt? Give --prompt TEXT, once or several times, or --prompts FILE")
    pieces = generate_texts(
        options.model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.min_p),
        seed=options.seed,
        stop=options.stop,
        chat=options.chat,
        dtype=options.dtype,
        batch_size=options.batch_size,
        compress=options.compress,
    )
    if len(prompts) == 1 and not options.json:
        for _, piece, _ in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts, done = [""] * len(prompts), set[int]()
    printed = 0
    for number, piece, is_over in pieces:
        texts[number] += piece
        done |= {number} if is_over else set()
        if is_over and not len(done) % options.batch_size:
            _say(f"{len(done):,} of {len(prompts):,} prompts")
        while printed in done:
            print(json.dumps({"prompt": prompts[printed], "text": texts[printed]}, ensure_ascii=False), flush=True)
            printed += 1


def _export(options: argparse.Namespace, flags: list[str]) -> None:
    from kdjax.jobs import export_run

    print(export_run(options.model, options.out))


def _student(options: argparse.Namespace, flags: list[str]) -> None:
    from rich.console import Console

    from kdjax.console import student_table
    from kdjax.data import DataConfig
    from kdjax.models import Cut
    from kdjax.student import make_student

    names = ("layers", "encoder_layers", "choose", "mlp", "heads", "kv_heads", "width", "vocab", "dense")
    cut = Cut(keep_layers=tuple(options.keep_layers), **{name: getattr(options, name) for name in names})
    text = DataConfig(sources=tuple(options.sources), sequence_length=options.sequence_length)
    report = make_student(options.teacher, options.out, cut, text, options.rows, options.dtype)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(student_table(report["models"]))
    for units, title in (("layers", "layers kept"), ("encoder_layers", "encoder layers kept")):
        if units in report["kept"]:
            console.print(f"{title}: {' '.join(map(str, report['kept'][units]))}")
    console.print(f"student: {options.out}   what was kept and why: {options.out / 'student.json'}")


def _report(options: argparse.Namespace, flags: list[str]) -> None:
    from kdjax.report import default_out, write_report

    print(write_report(options.runs, options.out or default_out(options.runs)))


def _fetch(options: argparse.Namespace, flags: list[str]) -> None:
    from kdjax.models.fetch import fetch

    fetch(options.name)


CONFIGURED = (_train, _answers, _prompts, _pipeline, _effect, _plan)
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace, list[str]], int | None], text: str
    ) -> argparse.ArgumentParser:
        # The help of train with a config is about the config's flags.
        command = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, add_help=run not in CONFIGURED
        )
        command.set_defaults(run=run, print_help=command.print_help)
        return command

    train = add("train", _train, "distil, or pre-train where the config has no teacher; run again to go on")
    add_config(train)
    add_launch(train)
    add_profile(train)
    add_config(add("answers", _answers, "sample the teacher's answers that a config trains on; run again to go on"))
    evaluate = add("evaluate", _evaluate, "measure a run's best saved step on its held-out text")
    evaluate.add_argument("run_dir", type=Path, metavar="RUN")
    evaluate.add_argument("--json", action="store_true", help="print JSON and nothing else")
    generate = add("generate", _generate, "continue a prompt with a run or a model")
    generate.add_argument("model", metavar="RUN_OR_MODEL")
    add_generate(generate)
    export = add("export", _export, "write a run's model as a Hugging Face directory")
    export.add_argument("model", metavar="RUN")
    export.add_argument("out", type=Path, metavar="OUT_DIR")
    add_student(add("student", _student, "cut a student out of a teacher, and measure it before training"))
    add_config(add("prompts", _prompts, "find the prompt that a model does a task best with; run again to go on"))
    add_config(add("pipeline", _pipeline, "find a prompt, distil it and evaluate; run again to go on"))
    add_config(add("effect", _effect, "say what a prompt changes on a task, and what it costs; run again to go on"))
    add_plan(add("plan", _plan, "say what a config's training step takes on a machine that need not be here"))
    report = add("report", _report, "write one HTML page on a run, or several compared")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    report.add_argument("--out", type=Path, help="by default RUN/report.html, or report.html for several")
    fetch = add("fetch", _fetch, "get a known model into the cache")
    fetch.add_argument("name")
    return parser, commands.choices
