"""What of a prompt is recovered by configs/prompt_distill.py, over seeds; and of a prompt that it was not taught.

COMMAND: python -m benchmarks.prompt_distill --seeds 5     (about 17 minutes a seed on a CPU core; run again to go on)

Appends one JSON object a run to benchmarks/results/prompt_distill.jsonl; the table of docs/prompts.md is made from it.
The answers are sampled once, so the held-out ones are the same for all. The seed is that of the adapters and of the
order of the data. `control` is taught an unrelated prompt of as many tokens, and measured on the recipe's.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import harness, quick
from kdjax import config as configs
from kdjax.answers import answered, write_answers
from kdjax.build import build
from kdjax.config import Config
from kdjax.console import amount, percent, small
from kdjax.data import Tokenizer, system_views
from kdjax.models import ModelSpec
from kdjax.recovery import recovery
from kdjax.train import train

RESULTS = Path(__file__).parent / "results" / "prompt_distill.jsonl"
RECIPES = Path(__file__).parent.parent / "configs"
FIGURES = ("recovered", "recovered_interval", "recovered_own", "recovered_own_interval", "recovered_prompts")
FIGURES += ("behaviour", "forgetting", "saved")
OF_RUN = ("kl_before", "kl_after", "steps", "seconds", "held_out_sha256", "parameters_trained")

UNRELATED = """\
The tide tables of the harbour are printed in the spring and hang beside the door of the office, where they stay until
the year is over. Boats that come in late are moored at the outer wall. Bread is baked at four in the morning, and the
ovens are cold again at noon; whoever wants rolls on a Sunday orders them on Friday. The library lends three books at
a time. The bus to the hills leaves at ten past the hour, in winter only every other hour, and the last one comes back
at seven. Lost gloves are kept for a month.
"""
"""Nothing of the recipe's questions or its prompt; cut to as many tokens as that has."""

ARMS = {"recipe": "prompt_distill", "on-policy": "prompt_distill_onpolicy", "control": "prompt_distill"}
"""What is run -> the recipe it is made of."""


def of_arm(config: Config, arm: str, seed: int, home: Path) -> harness.Row:
    """Return the figures of one run, measured on the answers that the recipe's prompt has drawn out of the teacher."""
    config = replace(config, seed=seed, data=replace(config.data, seed=seed), prompt="")
    taught = replace(config, data=replace(config.data, teacher_view=_unrelated(config))) if arm == "control" else config
    run = home / f"{arm}-{seed}"
    run.mkdir(parents=True, exist_ok=True)  # a run that was ended goes on
    said = home / f"answers behind {'another' if arm == 'control' else 'the'} prompt"
    for name in sorted(sampled_once(taught, said).glob("answers.json*")):
        shutil.copy(name, run)
    summary = train(taught, run)
    if arm == "control":
        student = ModelSpec(source=str(run), dtype=config.student.dtype)
        job = build(
            replace(config, student=student), answered(config, sampled_once(config, home / "answers behind the prompt"))
        )
        summary |= recovery(job, job.start().params, job.frozen())
    shutil.rmtree(run)
    return {name: summary.get(name) for name in (*FIGURES, *OF_RUN)}


def sampled_once(config: Config, directory: Path) -> Path:
    """Return the directory with a config's answers, which are sampled once."""
    directory.mkdir(parents=True, exist_ok=True)
    write_answers(config, directory)
    return directory


def _unrelated(config: Config) -> str:
    """Return the teacher's view with an unrelated prompt, so many words of it that both have as many tokens."""
    job = build(replace(config, answers=replace(config.answers, by="data")))
    view = config.data.teacher_view
    prompt = json.loads(view[view.index('"content": ') + 11 : view.index('}, {"role": "user"')])
    return system_views(unrelated(job.tokenizer, prompt)).teacher


def unrelated(tokenizer: Tokenizer, prompt: str) -> str:
    """Return an unrelated text of as many tokens as a prompt."""
    return tokenizer.decode(tokenizer.encode(UNRELATED * 9)[: len(tokenizer.encode(prompt))])


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/prompts.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.prompt_distill` writes the figures that stand here."
    lines = [
        "| | seeds | recovered | on the student's own answers | behaviour: prompted, without, distilled | forgetting "
        "(nats) | KL before → after (nats) |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        said = ", ".join(
            percent(statistics.fmean(row["behaviour"][who] for row in own))
            for who in ("prompted", "unprompted", "distilled")
        )
        forgotten = small(statistics.fmean(row["forgetting"]["kl"] for row in own))
        kl = f"{amount(own[0]['kl_before'])} → {amount(statistics.fmean(row['kl_after'] for row in own))}"
        cells = [arm, str(len(own)), _share(own, "recovered"), _share(own, "recovered_own"), said, forgotten]
        lines.append(f"| {' | '.join([*cells, '–' if arm == 'control' else kl])} |")
    first, here = rows[0], rows[-1]["environment"]
    versions = ", ".join(f"{name} {here[name]}" for name in ("python", "jax", "flax"))
    seconds = ", ".join(f"{row['seconds']:,.0f}" for row in rows if row["arm"] == "recipe")
    return "\n".join(
        [
            *lines,
            "",
            "Mean over seeds of the order of the data and the adapters; in brackets the lowest and highest end of "
            f"their 95 % bootstrap intervals over {first['recovered_prompts']} prompts. {first['steps']} steps; "
            f"a request is {first['saved']['prompt_tokens']:,.0f} tokens shorter. Seconds of the recipe's "
            f"runs, their answers not counted: {seconds}. {harness.machine(here)}; {versions}.",
        ]
    )


def _share(rows: Sequence[harness.Row], name: str) -> str:
    low, high = (choose(row[f"{name}_interval"][i] for row in rows) for i, choose in enumerate((min, max)))
    return f"{percent(statistics.fmean(row[name] for row in rows))} ({percent(low)} to {percent(high)})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--answers", type=Path, metavar="DIR", help="where answers are kept; by default they are not")
    options = parser.parse_args(arguments)
    done = {(row["arm"], row["seed"]) for row in harness.kept(options)}
    environment = harness.environment()
    with tempfile.TemporaryDirectory() as directory:
        home = options.answers or Path(directory)
        for seed in range(options.seeds):
            for arm in [arm for arm in options.arms if (arm, seed) not in done]:
                config = configs.load(str(RECIPES / f"{ARMS[arm]}.py"))
                config = quick.recipe(config, home) if options.quick else config
                row = {"what": "prompt_distill", "arm": arm, "seed": seed} | of_arm(config, arm, seed, home)
                harness.tell(options, row, environment)
    return 0


if __name__ == "__main__":
    harness.leave(main)
