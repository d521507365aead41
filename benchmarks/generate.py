"""Greedy decoding with SmolLM2-135M-Instruct beside transformers, and how near it comes to what memory allows.

COMMAND: python -m benchmarks.generate          (about 4 minutes on 2 CPU cores; transformers where it is installed)
         python -m benchmarks.generate --quick  (seconds: a small random model, alone; nothing is kept)

Decoding is timed as the difference of two runs, of 1 and of 65 new tokens after the same prompts of 64, so prefill is
not in it. The floor is the time to read the weights once, and what the cache holds, at the bandwidth that the same
rounds measured by a product of a matrix of a gigabyte with a vector. Rows go to benchmarks/results/generate.jsonl,
anew each time; `python -m benchmarks.readme` puts them into docs/generation.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kdjax.console import amount, percent
from kdjax.generate import generate
from kdjax.models import Model, ModelConfig, open_model

RESULTS = harness.RESULTS / "generate.jsonl"
MODEL = "smollm2-135m-instruct"
SMALL = ModelConfig(vocab_size=49_152, width=64, layers=2, heads=2, kv_heads=1, head_width=32, mlp_width=128)
BATCHES = (1, 16)
PROMPT, SHORT, LONG, SHARED = 64, 1, 65, 512
READ = 2**28
"""Float32 numbers of the matrix that measures bandwidth."""


class Subject(NamedTuple):
    """What generates.

    Attributes:
        model: of this engine.
        params: its parameters, float32.
        directory: where transformers finds the same; None where it does not.
    """

    model: Model
    params: Any
    directory: Path | None = None


def subject(quick: bool = False) -> Subject:
    """Return the model; a quick one is small and of random weights."""
    if quick:
        model = Model(SMALL)
        return Subject(model, jax.jit(model.init)(jax.random.key(0)))
    file = open_model(MODEL)
    params = jax.tree.map(lambda tensor: jnp.asarray(tensor.all(), jnp.float32), file.tensors)
    return Subject(Model(file.config), params, Path(str(file.tokenizer)).parent)


def ours(model: Model, params: Any) -> Callable[..., list[list[int]]]:
    """Return (prompts, new tokens) -> continuations, by this engine."""
    return lambda prompts, new: generate(model, params, prompts, max_new_tokens=new)


def theirs(directory: Path | None) -> Callable[..., list[list[int]]] | None:
    """Return the same by transformers; None where it is not installed, or has no such model."""
    if directory is None or not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        tokens_BT = torch.tensor(prompts)
        with torch.no_grad():
            options = {"attention_mask": torch.ones_like(tokens_BT), "do_sample": False, "pad_token_id": 0}
            return model.generate(tokens_BT, max_new_tokens=new, **options)[:, tokens_BT.shape[1] :].tolist()

    return run


def floor_bytes(it: Subject, batch: int) -> int:
    """Return what one step of decoding must read: every weight, and the keys and values of half the new tokens."""
    c, weights = it.model.config, sum(x.nbytes for x in jax.tree.leaves(it.params))
    seen = PROMPT + (SHORT + LONG) // 2
    return weights + 4 * 2 * c.layers * batch * seen * c.kv_heads * c.head_width


def measure(it: Subject, batch: int, rounds: int) -> list[harness.Row]:
    """Return a row for each library, with the share of the floor."""
    runs = {"kdjax": ours(it.model, it.params), "transformers": theirs(it.directory)}
    prompts = np.random.default_rng(0).integers(1000, 40_000, (batch, PROMPT)).tolist()
    matrix, vector = np.ones((READ // 4096, 4096), np.float32), np.ones(4096, np.float32)
    variants = [harness.Variant("read", lambda: matrix @ vector, rounds, READ, meter=untold)]
    texts: dict[str, list[list[int]]] = {}
    for name, run in runs.items():
        if run is not None:
            texts[name] = [run(prompts, new) for new in (SHORT, LONG)][1]  # compiled and warm
            for new in (SHORT, LONG):
                timed = lambda run=run, new=new: run(prompts, new)  # noqa: E731
                variants.append(harness.Variant(f"{name} {new}", timed, rounds, 1.0, meter=untold))
    trials = harness.interleave(variants, least=rounds, on_trial=told)
    bandwidth = 4 * READ / min(trial.seconds for trial in trials["read"].values())
    rows = []
    for name in texts:
        each = [trials[f"{name} {LONG}"][n].seconds - trials[f"{name} {SHORT}"][n].seconds for n in range(rounds)]
        rates = [batch * (LONG - SHORT) / seconds for seconds in each]
        floor = batch * bandwidth / floor_bytes(it, batch)
        rows.append(
            {
                "what": "generate",
                "library": name,
                "batch": batch,
                "prompt": PROMPT,
                "rounds": rounds,
                "tokens_per_second": statistics.median(rates),
                "tokens_per_second_min": min(rates),
                "tokens_per_second_max": max(rates),
                "bandwidth": bandwidth,
                "floor_share": statistics.median(rates) / floor,
                "same_rows": sum(a == b for a, b in zip(texts[name], texts["kdjax"], strict=True)),
                "times": statistics.median(
                    (trials[f"transformers {LONG}"][n].seconds - trials[f"transformers {SHORT}"][n].seconds) / each[n]
                    for n in range(rounds)
                )
                if "transformers" in texts
                else None,
            }
        )
    return rows


def shared(it: Subject, batch: int, rounds: int) -> harness.Row:
    """Return the time to the first token after a long prompt: the same beginning for all, and different ones."""
    run, rng = ours(it.model, it.params), np.random.default_rng(1)
    begin = rng.integers(1000, 40_000, SHARED)
    ends = rng.integers(1000, 40_000, (batch, 16))
    same = [[*begin.tolist(), *end] for end in ends.tolist()]
    apart = [[1000 + row, *prompt[1:]] for row, prompt in enumerate(same)]
    variants = [
        harness.Variant(name, lambda prompts=prompts: run(prompts, 1), rounds, 1.0, meter=untold)
        for name, prompts in (("same", same), ("apart", apart))
    ]
    for variant in variants:
        variant.run()
    trials = harness.interleave(variants, least=rounds, on_trial=told)
    seconds = {name: harness.summary(trials[name])["seconds"] for name in trials}
    times = harness.ratio(trials["apart"], trials["same"])
    facts = {"batch": batch, "prompt": SHARED, "rounds": rounds, "times": times}
    return {"what": "shared prefix"} | facts | {f"seconds_{name}": value for name, value in seconds.items()}


def untold(run: Callable[[], Any]) -> None:
    """Run, and measure no memory."""
    run()


def told(variant: harness.Variant, trial: harness.Trial) -> None:
    """Say what was measured."""
    print(f"{variant.name}: {trial.seconds:.2f} s", file=sys.stderr, flush=True)


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the tables of docs/generation.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.generate` writes the figures that stand here."
    lines = [
        "| batch | library | tokens/s (range) | times transformers | share of the memory floor | rows of equal text |",
        "|--:|:--|--:|--:|--:|--:|",
    ]
    for row in [row for row in rows if row["what"] == "generate"]:
        spread = f"{amount(row['tokens_per_second_min'])} to {amount(row['tokens_per_second_max'])}"
        times = 1.0 if row["library"] == "transformers" else row["times"]
        lines.append(
            f"| {row['batch']} | {row['library']} | {amount(row['tokens_per_second'])} ({spread}) | {amount(times)} | "
            f"{percent(row['floor_share'])} | {row['same_rows']} of {row['batch']} |"
        )
    for row in [row for row in rows if row["what"] == "shared prefix"]:
        lines += [
            "",
            f"A first token after {row['batch']} prompts that share their first {row['prompt']} tokens comes in "
            f"{amount(row['seconds_same'])} s, {amount(row['times'])} times as fast as when nothing is shared "
            f"({amount(row['seconds_apart'])} s).",
        ]
    here, bandwidth = rows[0]["environment"], rows[0]["bandwidth"]
    versions = ", ".join(f"{name} {here[name]}" for name in ("python", "jax", "torch", "transformers") if name in here)
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {rows[0]['rounds']} interleaved rounds, float32, prompts of {PROMPT} tokens, {LONG - SHORT} "
            f"timed ones; {bandwidth / 1e9:.1f} GB/s read; {harness.machine(here)}; "
            f"{versions}; commit {here['commit']}.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything and write it."""
    parser = harness.parser(__doc__, RESULTS, "a small random model, 2 rounds; nothing is kept")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    it, environment, rounds = subject(options.quick), harness.environment(), 2 if options.quick else options.rounds
    environment |= {name: version(name) for name in ("torch", "transformers") if importlib.util.find_spec(name)}
    rows = [row for batch in BATCHES for row in measure(it, batch, rounds)]
    harness.tell_anew(options, [*rows, shared(it, max(BATCHES), rounds)], environment)
    return 0


if __name__ == "__main__":
    harness.leave(main)
