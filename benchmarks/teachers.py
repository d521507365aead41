"""One student taught by a live teacher and from a cache of each kind: held-out KL beside steps, and seconds.

COMMAND: python -m benchmarks.teachers                 (about 30 minutes on 2 CPU cores; run again to go on)
         python -m benchmarks.teachers --arms live     (a part of it)

The recipe is configs/quickstart.py: the same student, rows and steps for all, and held-out text measured against the
whole teacher. Labelling is counted apart, since it is done once for any number of students. Rows, each with its curve,
go to benchmarks/results/teachers.jsonl, of which docs/teachers.svg is drawn; `python -m benchmarks.readme` makes the
table of docs/teachers.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import harness, quick, runs
from kdjax import config as configs
from kdjax.config import Config
from kdjax.console import amount, percent
from kdjax.data.cache import of_manifest
from kdjax.label import label
from kdjax.teacher import LabelConfig

RECIPE = harness.ROOT / "configs" / "quickstart.py"
LOOKS = 8
"""Evaluations on the way."""


def _base(home: Path, is_quick: bool) -> Config:
    config = configs.load(str(RECIPE))
    config = replace(config, prompt="", eval_every=config.steps // LOOKS)
    if not is_quick:
        return config
    return replace(quick.recipe(config, home), objective=replace(config.objective, temperature=1.0))


def _kept(config: Config, run: Path, how: LabelConfig) -> Config:
    """Return a run from a cache, which is made here."""
    cache = run.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    label(replace(config, label=how), cache)
    return replace(config, label=how, cache=str(cache))


ARMS: dict[str, Callable[[Config, Path], Config]] = {
    "live": lambda config, run: config,
    "hidden state, bfloat16": partial(_kept, how=LabelConfig("hidden")),
    "top-64, 16 bits": partial(_kept, how=LabelConfig("topk", bits=16)),
    "12 draws, 8 bits": partial(_kept, how=LabelConfig("sampled", bits=8)),
}


def _more(config: Config, run: Path) -> harness.Row:
    return {"bytes_per_token": of_manifest(Path(config.cache)).manifest["bytes_per_token"]} if config.cache else {}


def _if_kept(row: harness.Row, text: str) -> str:
    return text.format(**row) if row.get("bytes_per_token") else "–"


STUDY = runs.Study(
    name="teachers",
    doc=__doc__ or "",
    base=_base,
    arms=ARMS,
    columns={
        "bytes a token on disk": lambda row: _if_kept(row, "{bytes_per_token:,.1f}"),
        "a step": lambda row: f"{row['step_seconds']:.2f} s",
        "labelling, once": lambda row: _if_kept(row, "{made_seconds:,.0f} s"),
        "held-out KL before → after": lambda row: f"{amount(row['kl_before'])} → {row['kl_after']:.3f}",
        "agreement": lambda row: percent(row["agreement_after"]),
        "perplexity": lambda row: f"{row['perplexity_after']:,.2f}",
    },
    curve=("eval_kl", "held-out KL to the teacher, nats a token"),
    about=lambda row: (
        f"{row['steps']} steps, {row['train_tokens']:,} tokens of `configs/quickstart.py`, one run each; KL in nats a "
        "token."
    ),
    more=_more,
)

if __name__ == "__main__":
    runs.run(STUDY)
