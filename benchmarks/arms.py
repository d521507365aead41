"""Ways to teach a prompt's behaviour at equal data, steps and tokens: by which loss, whose answers, training what.

COMMAND: python -m benchmarks.arms                  (about 9 hours of a CPU core; run again to go on)
         python -m benchmarks.arms --arms "forward KL" "prefix of 16, prompt" --tries 1       (a part of it)

All have the questions, the prompt and the answers of configs/soft_prompt.py, and are measured on its held-out answers.
Each is trained at three learning rates, a factor apart around the middle one of what it trains. Rows go to
benchmarks/results/arms.jsonl, of which docs/arms.svg is drawn; `python -m benchmarks.readme` makes the table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from benchmarks import harness, quick
from benchmarks.prompt_distill import sampled_once, unrelated
from kdjax import config as configs
from kdjax.answers import ANSWERS, PROGRESS, answered
from kdjax.build import build
from kdjax.config import Config
from kdjax.console import count, percent, small
from kdjax.data.python_docs import questions
from kdjax.job import Job
from kdjax.models import ModelSpec
from kdjax.models.config import Lora, SoftPrompt
from kdjax.recovery import recovery
from kdjax.train import train

RESULTS = harness.RESULTS / "arms.jsonl"
RECIPE = harness.ROOT / "configs" / "soft_prompt.py"
PICTURE = harness.ROOT / "docs" / "arms.svg"
INK = "#1f5fa8"

RATES = {"lora": 1e-3, "all": 3e-5, "prompt": 1e-2, "prefix": 1e-2}
"""What is trained -> its middle learning rate."""
FACTORS = (1.0, 3.0, 1 / 3)
"""Of it, tried for each arm."""

FIGURES = ("recovered", "recovered_interval", "recovered_prompts", "recovered_own", "recovered_own_interval")
FIGURES += ("behaviour", "forgetting", "saved")
OF_RUN = ("kl_after", "parameters_trained", "steps", "seconds")


class Arm(NamedTuple):
    """One way: what is trained, by which config, and whether the answers taught are other ones than those measured."""

    trains: str
    of: Callable[[Config, Path], Config]
    others: bool = False


def _objective(**parts: Any) -> Arm:
    return Arm("lora", lambda config, home: replace(config, objective=replace(config.objective, **parts)))


def _rank(rank: int) -> Arm:
    return Arm("lora", lambda config, home: _student(config, lora=Lora(rank)))


def _student(config: Config, **parts: Any) -> Config:
    return replace(config, student=ModelSpec(source="teacher", **parts))


def _soft(kind: Any, tokens: int, start: Any) -> Callable[[Config, Path], Config]:
    """Return how a config's student becomes a soft prompt, which may begin as the prompt itself."""

    def of(config: Config, home: Path) -> Config:
        text = configs.load(str(RECIPE)).student.soft_prompt.text if start == "prompt" else ""
        return _student(config, soft_prompt=SoftPrompt(tokens, kind, start, text))

    return of


def _on_policy(config: Config, home: Path) -> Config:
    objective = replace(config.objective, divergence="reverse_kl")
    return replace(config, objective=objective, answers=replace(config.answers, student_share=1.0))


def _gold(config: Config, home: Path) -> Config:
    """Return supervised training on answers as a person would write them: the documentation, framed as asked for."""
    rows = [json.loads(line) for line in (home / "answers" / ANSWERS).read_text("utf-8").splitlines()]
    gold = {row["id"]: row["answer"] for row in questions()}
    path = home / "gold.jsonl"
    framed = ({**row, "answer": f"Ahoy! {' '.join(gold[row['id']].split()[:16])} matey."} for row in rows)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in framed), "utf-8")
    data = replace(config.data, sources=(f"jsonl:{path}",))
    return replace(
        config, data=data, answers=replace(config.answers, by="data"), objective=replace(config.objective, alpha=1.0)
    )


def _control(config: Config, home: Path) -> Config:
    """Return a config whose teacher has an unrelated prompt of as many tokens."""
    tokenizer = build(replace(config, answers=replace(config.answers, by="data"))).tokenizer
    system, view = configs.load(str(RECIPE)).student.soft_prompt.text, config.data
    head, end = "<|im_start|>system\n", "<|im_end|>\n"
    other = unrelated(tokenizer, system.removeprefix(head).removesuffix(end))
    return replace(config, data=replace(view, teacher_view=f"{head}{other}{end}{view.student_view}"))


ARMS: dict[str, Arm] = {
    "forward KL": _objective(),
    "reverse KL": _objective(divergence="reverse_kl"),
    "JSD": _objective(divergence="jsd(beta=0.5)"),
    "hard top-1": _objective(divergence="hard_cross_entropy"),
    "the teacher's text alone": _objective(alpha=1.0),
    "gold answers": Arm("lora", _gold, others=True),
    "reverse KL, on-policy": Arm("lora", _on_policy),
    "LoRA, rank 4": _rank(4),
    "LoRA, rank 64": _rank(64),
    "all weights": Arm("all", lambda config, home: _student(config)),
    **{
        f"{tokens} soft tokens, {start}": Arm("prompt", _soft("prompt", tokens, start))
        for start, counts in {"prompt": (16, 4, 64), "random": (16, 4, 64), "vocabulary": (16,)}.items()
        for tokens in counts
    },
    **{f"prefix of {tokens}, prompt": Arm("prefix", _soft("prefix", tokens, "prompt")) for tokens in (16, 4, 64)},
    **{f"the prompt cut to {tokens}": Arm("", _soft("prompt", tokens, "prompt")) for tokens in (4, 16, 64)},
    "control: an unrelated prompt": Arm("lora", _control, others=True),
}
"""Name -> what is trained and how. Where nothing is said otherwise: forward KL, adapters of rank 16, off-policy."""


def base() -> Config:
    """Return the recipe that all arms are made from: adapters of rank 16 in the place of its soft prompt."""
    return replace(_student(configs.load(str(RECIPE)), lora=Lora(16)), eval_every=0, prompt="")


def of_arm(config: Config, name: str, rate: float, seed: int, home: Path) -> harness.Row:
    """Return the figures of one run, measured on the answers that the base's prompt has drawn out of the teacher."""
    arm, run = ARMS[name], home / "run"
    config = replace(config, seed=seed, optim=replace(config.optim, learning_rate=rate))
    shared = sampled_once(config, home / "answers")
    taught = arm.of(config, home)
    places = {"places": taught.student.soft_prompt.tokens}
    if not arm.trains:
        summary = _measured(build(taught, answered(taught, shared)))
        return {name: summary.get(name) for name in FIGURES} | places
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    if taught.answers.by == "teacher":
        said = sampled_once(taught, home / "other answers") if arm.others else shared
        for file in (ANSWERS, PROGRESS):
            shutil.copyfile(said / file, run / file)
    summary = train(taught, run)
    if arm.others:
        job = build(replace(config, student=ModelSpec(source=str(run))), answered(config, shared))
        summary |= _measured(job)
    return {name: summary.get(name) for name in (*FIGURES, *OF_RUN)} | places


def _measured(job: Job) -> harness.Row:
    return recovery(job, job.start().params, job.frozen())


def rates(name: str) -> list[float]:
    """Return the learning rates that an arm is tried at; a single 0 where nothing is trained."""
    trains = ARMS[name].trains
    return [factor * RATES[trains] for factor in FACTORS] if trains else [0.0]


def best(rows: Sequence[harness.Row]) -> list[harness.Row]:
    """Return of each arm, in their order, the run at the learning rate that recovers most."""
    groups = ([row for row in rows if row["arm"] == name] for name in ARMS)
    return [max(group, key=lambda row: row["recovered"]) for group in groups if group]


FAMILIES: dict[str, Callable[[str], bool]] = {
    "soft tokens from the prompt": lambda arm: arm.endswith("soft tokens, prompt"),
    "soft tokens from random": lambda arm: arm.endswith("soft tokens, random"),
    "prefix from the prompt": lambda arm: arm.startswith("prefix"),
    "the prompt cut": lambda arm: arm.startswith("the prompt cut"),
    "weights (forward KL)": lambda arm: arm == "forward KL",
}
"""Name of a line in the picture -> whether an arm is on it."""

COLUMNS: dict[str, Callable[[harness.Row], str]] = {
    "rate": lambda row: format(row["rate"], ".2g") if row["rate"] else "–",
    "trained": lambda row: count(row["parameters_trained"]) if row["rate"] else "–",
    "recovered": lambda row: _share(row, "recovered"),
    "on its own answers": lambda row: _share(row, "recovered_own"),
    "behaviour": lambda row: percent(row["behaviour"]["distilled"]),
    "forgetting (nats)": lambda row: small(row["forgetting"]["kl"]),
    "places a request": lambda row: str(row["places"]),
}
"""Head of a column -> what of a row stands in it."""


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/case-study.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.arms` writes the figures that stand here."
    found = best(rows)
    said, places, last = found[0]["behaviour"], f"{prompt_places(found):.0f}", rows[-1]
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|:--|{'--:|' * len(COLUMNS)}"]
    lines += [
        f"| the prompt as it is | – | – | 100.0 % | 100.0 % | {percent(said['prompted'])} | – | {places} |",
        f"| no prompt | – | – | 0.0 % | 0.0 % | {percent(said['unprompted'])} | – | 0 |",
        *(f"| {' | '.join([row['arm'], *(cell(row) for cell in COLUMNS.values())])} |" for row in found),
    ]
    tried = {name: len({row["rate"] for row in rows if row["arm"] == name}) for name in ARMS}
    fewer = [f"{name} ({number})" for name, number in tried.items() if 0 < number < len(rates(name))]
    short = f" Tried at fewer, so far: {', '.join(fewer)}." if fewer else ""
    absent = [name for name, number in tried.items() if not number]
    steps = max(row.get("steps") or 0 for row in rows)
    short += f" Not measured yet: {', '.join(absent)}." if absent else ""
    return "\n".join(
        [
            *lines,
            "",
            f"![What each arm recovers, and beside the places that a request keeps for it]({PICTURE.name})",
            "",
            f"{steps} steps of 4 rows each; shares with their 95 % bootstrap interval over {last['recovered_prompts']} "
            "unseen questions. Places are those of a request's cache that stand before its question. Each arm is shown "
            f"at that of {len(FACTORS)} learning rates, a factor of 3 apart, at which it recovers most of these very "
            f"answers, which flatters all arms alike.{short} {harness.measured_on(last['environment'])}.",
        ]
    )


def _share(row: harness.Row, name: str) -> str:
    low, high = map(percent, row[f"{name}_interval"])
    return f"{percent(row[name])} ({low} to {high})"


def prompt_places(rows: Sequence[harness.Row]) -> float:
    """Return how many places the prompt as it is has in a request."""
    return rows[0]["saved"]["prompt_tokens"] + rows[0]["places"]


def picture(rows: Sequence[harness.Row]) -> Figure:
    """Return what each arm recovers, and what that is beside the places that a request keeps for it."""
    figure, found = Figure(figsize=(11, 6.2), layout="constrained"), best(rows)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ranked = sorted(found, key=lambda row: row["recovered"])
    for y, row in enumerate(ranked):
        left.plot([100 * end for end in row["recovered_interval"]], [y, y], color=INK, lw=2, alpha=0.45)
        left.plot(100 * row["recovered"], y, "o", color=INK)
        left.plot(100 * row["recovered_own"], y, "o", color=INK, markerfacecolor="white", zorder=1)
    left.set(title="Recovered, %", yticks=range(len(ranked)), yticklabels=[row["arm"] for row in ranked])
    left.set_xlabel("filled: on the prompted teacher's answers, with the 95 % interval; hollow: on its own answers")
    for (name, pick), style in zip(FAMILIES.items(), ("o-", "s--", "^-.", "x:", "D"), strict=True):
        points = sorted((row["places"], 100 * row["recovered"]) for row in found if pick(row["arm"]))
        right.plot(*zip(*points, strict=True), style, label=name) if points else None
    right.plot(prompt_places(found), 100, "*", ms=12, label="prompt")
    right.set_xscale("symlog", linthresh=4)
    right.set(title="Recovered, %, by places kept", xlabel="places before the question", xlim=(-0.5, 300))
    right.set_ylim(-60, 105)  # the legend stands below all points
    right.set_xticks([0, 4, 16, 64, 200], ["0", "4", "16", "64", "200"])
    right.legend(frameon=False, fontsize="small", loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.axhline(0, color="grey", lw=0.8) if axes is right else axes.axvline(0, color="grey", lw=0.8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the results yet: all arms at their middle rate first."""
    parser = harness.parser(__doc__, RESULTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--tries", type=int, default=len(FACTORS), help="how many of an arm's rates; the middle first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=Path("runs") / "arms", metavar="DIR")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="PATH")
    options = parser.parse_args(arguments)
    environment, rows = harness.environment(), harness.kept(options)
    done = {(row["arm"], row["rate"], row["seed"]) for row in rows}
    plan = [
        (arm, rate, options.seed)
        for n in range(options.tries)
        for arm in options.arms
        for rate in rates(arm)[n : n + 1]
    ]
    left = [case for case in plan if case not in done]
    progress = harness.Progress(len(left), None)
    with harness.home(options, options.home) as home:
        config = quick.recipe(base(), home) if options.quick else base()
        for arm, rate, seed in left:
            row = {"what": "arms", "arm": arm, "rate": rate, "seed": seed} | of_arm(config, arm, rate, seed, home)
            rows.append(harness.tell(options, row, environment))
            progress.advance(1, f"{arm}, rate {rate:g}: recovered {percent(row['recovered'])}")
            if not options.quick:
                with matplotlib.rc_context({"svg.hashsalt": "kdjax"}):
                    picture(rows).savefig(options.picture, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    harness.leave(main)
