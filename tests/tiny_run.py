"""A run so small that a test can afford it: random teacher and student, bytes as tokens, its own text."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 240
TIMES = ("tokens_per_second", "model_flops_per_second", "seconds", "eval_seconds")
OF_THE_START = ("first_step_seconds", "teachers_flops", "compiled_seconds", "compiled_programs", "compiled_cached")

RECIPE = '''"""A test's recipe."""

from pathlib import Path

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.models import ModelConfig, ModelSpec
from kdjax.optim import OptimConfig


def get_config() -> Config:
    small = ModelConfig(vocab_size=264, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=32)
    return Config(
        name="tiny",
        teacher=ModelSpec(architecture=small),
        student=ModelSpec(architecture=small),
        data=DataConfig(
            sources=(f"text:{Path(__file__).with_name('text.txt')}",),
            tokenizer="bytes",
            sequence_length=32,
            eval_tokens=1024,
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=2),
        steps=4,
        batch_size=16,
        microbatches=2,
        prompt="The",
        prompt_tokens=4,
        notes=("Read [bold]this[/bold].",),
    )
'''


COMPILED = "compiled"


@pytest.fixture(scope="module")
def home(tmp_path_factory, compiled):
    """A directory with the recipe, whose processes find what any test compiled."""
    directory = tmp_path_factory.mktemp("home")
    (directory / COMPILED).symlink_to(compiled)
    write_recipe(directory)
    return directory


def write_recipe(directory, text=RECIPE):
    """Write the recipe and its text; return the recipe's path."""
    draw = random.Random(0)
    words = [bytes(draw.choices(b"abcdefghijklmnopqrstuvwxyz", k=draw.randrange(2, 9))).decode() for _ in range(300)]
    paragraphs = [" ".join(draw.choices(words, k=400)) for _ in range(60)]
    (directory / "text.txt").write_text("\n\n".join(paragraphs))
    path = directory / "tiny.py"
    path.write_text(text)
    return path


def command(*arguments):
    return [sys.executable, "-m", "kdjax", *map(str, arguments)]


def environment(directory, **more):
    """The environment of a process of its own, `more` of it set, or unset by None: one CPU device, and what one process
    compiled the next one finds."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory / COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **cache, **more}
    return {name: value for name, value in found.items() if value is not None}


def run(directory, *arguments, **more):
    """Run kdjax in a process of its own, with `directory` as the working directory."""
    return subprocess.run(
        command(*arguments),
        cwd=directory,
        env=environment(directory, **more),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def run_until(directory, run_dir, step, number: signal.Signals, *arguments):
    """Run kdjax, send it a signal once it has written the row of `step`; return exit code and standard error."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=directory,
        env=environment(directory),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        end = time.monotonic() + LIMIT_SECONDS
        while last_step(run_dir) < step and process.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"no step {step} within {LIMIT_SECONDS} s")
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
        return process.returncode, errors.decode()
    finally:
        process.kill()


def last_step(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def rows(run_dir, times=False):
    """The rows of a run's metrics, without how long things took, and what the first step of a process adds."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    without = () if times else (*TIMES, *OF_THE_START)
    return [{name: row[name] for name in row if name not in without} for row in found]
