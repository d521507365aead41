"""What each subcommand does: it reads its options, calls one function, and shows what came of it; no logic."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdjax.errors import UserError

if TYPE_CHECKING:
    from kdjax.config import Config
    from kdjax.pipeline import PipelineConfig
    from kdjax.prompts.config import EffectConfig, PromptsConfig

C = TypeVar("C", "Config", "EffectConfig", "PipelineConfig", "PromptsConfig")


def say(text: str) -> None:
    """Show a line on standard error."""
    print(f"kdjax: {' '.join(text.split())}", file=sys.stderr)


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


def run_train(options: argparse.Namespace, flags: list[str]) -> int:
    """Train, or go on training, and write the report."""
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
            say(str(stopped))
        return stopped.exit_code
    if not speaks:
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(final_table(summary))
    for note in config.notes:
        console.print(note)
    console.print(f"report: {write_report([directory], directory / 'report.html')}")
    return 0


def run_answers(options: argparse.Namespace, flags: list[str]) -> int:
    """Sample answers."""
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


def run_label(options: argparse.Namespace, flags: list[str]) -> None:
    """Run the teacher over a run's data, and keep what it says."""
    import jax

    from kdjax.config import Config
    from kdjax.data.cache import inspected
    from kdjax.distributed import Launch, join
    from kdjax.label import CONFIG, label

    config, _ = _configured(options, flags, Config)
    if options.out is None:
        raise UserError("where to? kdjax label CONFIG OUT, a directory of the cache's own")
    join(Launch(options.coordinator, options.processes, options.process, options.auto, options.timeout))
    if jax.process_index() != 0:
        for handler in logging.getLogger("kdjax").handlers:
            handler.setLevel(logging.ERROR)
    label(config, options.out)
    if jax.process_index() == 0:
        _show(inspected(options.out))
        print(f"train on it: kdjax train {options.out / CONFIG} --cache {options.out}")


def run_cache(options: argparse.Namespace, flags: list[str]) -> int:
    """Say what a cache holds, whether it is whole, and whether the teacher says the same today."""
    from kdjax.data.cache import inspected
    from kdjax.label import verified

    found = inspected(options.directory)
    if options.verify and not found["damaged"]:
        found |= verified(options.directory, options.verify)
    if options.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 2 if found["damaged"] else 0


def _show(found: dict[str, Any]) -> None:
    """Show what is said of a cache, a line each."""
    from rich.console import Console

    from kdjax.console import cache_table

    Console(highlight=False, markup=False, soft_wrap=True).print(cache_table(found))


def run_prompts(options: argparse.Namespace, flags: list[str]) -> None:
    """Search for a prompt, or make new ones."""
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


def run_pipeline(options: argparse.Namespace, flags: list[str]) -> int:
    """Find a prompt, distil it, evaluate."""
    from rich.console import Console

    from kdjax.console import pipeline_table
    from kdjax.pipeline import SUMMARY, PipelineConfig, pipeline
    from kdjax.train import Stopped

    config, directory = _configured(options, flags, PipelineConfig)
    try:
        summary = pipeline(config, directory)
    except Stopped as stopped:
        say(str(stopped))
        return stopped.exit_code
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(pipeline_table(summary))
    console.print(f"figures: {directory / SUMMARY}   model: {directory / 'distil'}")
    return 0


def run_effect(options: argparse.Namespace, flags: list[str]) -> None:
    """Analyse what prompts change."""
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


def run_plan(options: argparse.Namespace, flags: list[str]) -> None:
    """Say what a config takes on a machine."""
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


def run_evaluate(options: argparse.Namespace, flags: list[str]) -> None:
    """Measure a run."""
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


def run_generate(options: argparse.Namespace, flags: list[str]) -> None:
    """Continue prompts."""
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
            say(f"{len(done):,} of {len(prompts):,} prompts")
        while printed in done:
            print(json.dumps({"prompt": prompts[printed], "text": texts[printed]}, ensure_ascii=False), flush=True)
            printed += 1


def run_export(options: argparse.Namespace, flags: list[str]) -> None:
    """Export a run."""
    from kdjax.jobs import export_run

    print(export_run(options.model, options.out))


def run_student(options: argparse.Namespace, flags: list[str]) -> None:
    """Cut a student out of a teacher."""
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


def run_report(options: argparse.Namespace, flags: list[str]) -> None:
    """Write a report."""
    from kdjax.report import default_out, write_report

    print(write_report(options.runs, options.out or default_out(options.runs)))


def run_fetch(options: argparse.Namespace, flags: list[str]) -> None:
    """Fetch a model."""
    from kdjax.models.fetch import fetch

    fetch(options.name)
