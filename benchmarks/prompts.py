"""A prompted teacher's forward pass: the prompt in each row, run once a batch, and run once for all.

COMMAND: python -m benchmarks.prompts          (about 17 minutes on a CPU core once the teacher is fetched)
         python -m benchmarks.prompts --quick  (seconds: two layers, the shortest prompt; nothing is kept)

Each example has 64 tokens, of which the loss needs the hidden states of the last 32; before each stands one and the
same prompt. What is timed is the teacher's part of a step, `kdjax.teacher.live_teacher`, in float32. Of each way the
layouts of rows (examples in one row) are tried once, and the fastest takes part in the rounds. The floor is what the
examples' own tokens need when the prompt's keys and values are known: 2 · parameters of the layers' matrices a token,
and 4 · layers · heads · head width for each pair of a token with one that it sees, at the rate that the same rounds
measured by a product of two matrices. Rows go to benchmarks/results/prompts.jsonl, anew each time;
`python -m benchmarks.readme` puts them into docs/prompts.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kdjax.console import amount, percent
from kdjax.errors import UserError
from kdjax.models import Model, ModelConfig, open_model, prefix_of
from kdjax.shapes import Batch, View
from kdjax.teacher import live_teacher

RESULTS = harness.RESULTS / "prompts.jsonl"
MODEL = "smollm2-135m-instruct"
SHAPE = ModelConfig(
    vocab_size=49_152, width=576, layers=30, heads=9, kv_heads=3, head_width=64, mlp_width=1536, max_positions=8192
)
"""The same shape with random weights, where the model cannot be had: its time is the same."""
PROMPTS = (128, 512, 1024)
EXAMPLES, TOKENS, ANSWER = 8, 64, 32
LAYOUTS = (1, 2, 4, 8)
"""Examples in a row."""
SIDE = 2048
"""Of the square matrices whose product measures the rate."""
WAYS = ("in each row", "once a batch", "once for all")
"""Where the prompt is run."""


def teacher(quick: bool = False) -> tuple[Model, Any, str]:
    """Return the model, its parameters, and what they are; a quick one has two layers of random weights."""
    if quick:
        return random(replace(SHAPE, layers=2))
    try:
        file = open_model(MODEL)
    except UserError as error:
        print(f"{error}; random weights of its shape instead", file=sys.stderr)
        return random(SHAPE)
    return Model(file.config), jax.tree.map(lambda tensor: jnp.asarray(tensor.all()), file.tensors), MODEL


def random(config: ModelConfig) -> tuple[Model, Any, str]:
    """Return a model of random weights, as `teacher` does."""
    layers = f"{config.layers} layers " if config != SHAPE else ""
    return Model(config), jax.jit(Model(config).init)(jax.random.key(0)), f"random, {layers}of the shape of {MODEL}"


def batch(head: Sequence[int], each: int) -> Batch:
    """Return the examples, so many in each row, each behind `head`, as the teacher sees them."""
    size, count = len(head) + TOKENS, EXAMPLES // each
    own = np.random.default_rng(1).integers(1000, 40_000, (count, each, TOKENS))
    before = np.broadcast_to(np.asarray(head, np.int64), (count, each, len(head)))
    tokens_BT = np.concatenate([before, own], axis=2).reshape(count, -1).astype(np.int32)
    position_BT = np.tile(np.arange(size, dtype=np.int32), (count, each))
    segment_BT = np.tile(np.repeat(np.arange(1, each + 1, dtype=np.int32), size), (count, 1))
    ends = np.arange(each)[:, None] * size + np.arange(size - ANSWER - 1, size - 1)[None]
    rows_BR = np.tile(ends.reshape(1, -1).astype(np.int32), (count, 1))
    view, ones_BR = View(tokens_BT, segment_BT, position_BT), np.ones(rows_BR.shape, np.float32)
    return Batch(view, rows_BR, np.zeros_like(rows_BR), ones_BR, ones_BR, view, rows_BR)


def run_of(way: str, model: Model, params: Any, prompt: Sequence[int], each: int) -> Callable[[], Any]:
    """Return what gives the hidden states in that way, compiled and warm."""
    own = jax.device_put(batch(prompt if way == "in each row" else (), each))
    frozen = {"teacher": params}
    if way == "once for all":
        frozen["teacher_prefix"] = prefix_of(model, params, prompt)

    signal_of: Any = live_teacher(model)

    @jax.jit
    def hidden(frozen: Any, own: Batch) -> Any:
        if way == "once a batch":
            frozen = frozen | {"teacher_prefix": prefix_of(model, frozen["teacher"], prompt)}
        return signal_of(frozen, own).hidden_ND

    run = lambda: hidden(frozen, own).block_until_ready()  # noqa: E731
    run()
    return run


def fastest(way: str, model: Model, params: Any, prompt: Sequence[int]) -> tuple[Callable[[], Any], dict[int, float]]:
    """Return the run of the fastest layout, and the seconds of each by examples in a row."""
    runs, seconds = {}, {}
    for each in LAYOUTS:
        runs[each] = run_of(way, model, params, prompt, each)
        began = time.perf_counter()
        runs[each]()
        seconds[each] = time.perf_counter() - began
        if seconds[each] > 1.3 * min(seconds.values()):
            break  # longer rows are slower still
    return runs[min(seconds, key=seconds.__getitem__)], seconds


def floor_operations(config: ModelConfig, params: Any, prompt: int) -> float:
    """Return the operations of all examples' own tokens behind a prompt whose keys and values are known."""
    matrices = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim > 2)  # stacked norms have two axes
    pairs = sum(prompt + place + 1 for place in range(TOKENS))
    attention = 4 * config.layers * config.heads * config.head_width * pairs
    return float(EXAMPLES * (2 * matrices * TOKENS + attention))


def measure(model: Model, params: Any, prompt: int, rounds: int) -> list[harness.Row]:
    """Return a row for each way of running the teacher behind a prompt of so many tokens."""
    head = np.random.default_rng(0).integers(1000, 40_000, prompt).tolist()
    made = {way: fastest(way, model, params, head) for way in WAYS}
    check([run() for run, _ in made.values()])
    square = jnp.ones((SIDE, SIDE), jnp.float32)
    product = jax.jit(jnp.matmul)
    ready = lambda: product(square, square).block_until_ready()  # noqa: E731
    variants = [harness.Variant(way, run, rounds, 1.0, meter=harness.unmetered) for way, (run, _) in made.items()]
    variants.append(harness.Variant("rate", ready, rounds, 1.0, meter=harness.unmetered))
    ready()
    trials = harness.interleave(variants, least=rounds, on_trial=said)
    rate = 2 * SIDE**3 / harness.summary(trials["rate"])["seconds"]
    floor = floor_operations(model.config, params, prompt)
    return [
        {
            "prompt_tokens": prompt,
            "way": way,
            **{name: value for name, value in harness.summary(trials[way]).items() if name != "measured_bytes"},
            "examples": EXAMPLES,
            "example_tokens": TOKENS,
            "layout": min(made[way][1], key=made[way][1].__getitem__),
            "layout_seconds": made[way][1],
            "tokens_per_second": EXAMPLES * TOKENS / harness.summary(trials[way])["seconds"],
            "ratio": 1 / (harness.ratio(trials[way], trials[WAYS[0]]) or 1.0),
            "floor_operations": floor,
            "operations_per_second": rate,
            "floor_share": floor / rate / harness.summary(trials[way])["seconds"],
        }
        for way in WAYS
    ]


def check(hiddens: Sequence[Any]) -> None:
    """Check that all ways say the same.

    Raises:
        SystemExit: they do not.
    """
    first = np.asarray(hiddens[0])
    for other in hiddens[1:]:
        if (error := np.abs(np.asarray(other) - first).max() / np.abs(first).max()) > 1e-3:
            sys.exit(f"the hidden states differ by {error:.2g} of the largest: nothing is measured")


def said(variant: harness.Variant, trial: harness.Trial) -> None:
    """Say on stderr what was measured."""
    print(f"{variant.name}: {trial.seconds:.3f} s", file=sys.stderr, flush=True)


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the table of docs/prompts.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.prompts` writes the figures that stand here."
    names = "prompt, tokens", "it is run", "tokens of examples a second (range)", "times the first", "of the floor"
    lines = [f"| {' | '.join(names)} |", "|--:|:--|--:|--:|--:|"]
    for row in rows:
        tokens = row["examples"] * row["example_tokens"]
        low, high = (amount(tokens / row[name]) for name in ("seconds_max", "seconds_min"))
        speed = f"{amount(row['tokens_per_second'])} ({low} to {high})"
        cells = str(row["prompt_tokens"]), row["way"], speed, f"{row['ratio']:.1f}", percent(row["floor_share"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", measured_on(rows)])


def measured_on(rows: Sequence[harness.Row]) -> str:
    """Return what was measured, and where."""
    last, here = rows[-1], rows[-1]["environment"]
    rate = statistics.median(row["operations_per_second"] for row in rows)
    return (
        f"{last['teacher']} in float32, {last['examples']} examples of {last['example_tokens']} tokens a batch, each "
        f"way in its fastest layout of rows; medians of {last['rounds']} interleaved rounds. The floor is what the "
        "examples' own tokens need once the prompt's keys and values are known: 2 operations a token and parameter of "
        "the layers' matrices, 4 · layers · heads · head width a pair of tokens, at the rate of a plain product of "
        f"matrices in the same rounds ({amount(rate / 1e9)} GFLOP/s in the table's median). "
        f"{harness.machine(here)}; jax {here['jax']}; commit {here.get('commit')}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all ways at each length of the prompt."""
    parser = harness.parser(__doc__, RESULTS, "two layers, the first prompt, 2 rounds; nothing is kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, metavar="TOKENS")
    options = parser.parse_args(arguments)
    environment, (model, params, name), rows = harness.environment(), teacher(options.quick), []
    facts = {"teacher": name, "environment": environment}
    prompts, rounds = (options.prompts[:1], 2) if options.quick else (options.prompts, options.rounds)
    for prompt in prompts:
        rows += [row | facts for row in measure(model, params, prompt, rounds)]
        print(markdown(rows), file=sys.stderr, flush=True)
    if not options.quick:
        options.results.unlink(missing_ok=True)
        harness.append(options.results, rows)
    print(json.dumps({f"{row['prompt_tokens']} {row['way']}": row["ratio"] for row in rows}))
    return 0


if __name__ == "__main__":
    harness.leave(main)
