"""How much memory the fused loss takes on a GPU that is not there: compiled for it, never run.

COMMAND: python -m benchmarks.loss_compiled      (a minute; needs pip install "jax[cuda13]", but no GPU and no driver)

Liger-Kernel's published size: 8,192 tokens, hidden width 2,048 and 4,096, vocabulary 128,256, bf16, JSD. Rows are
appended to benchmarks/results/loss_compiled.jsonl. Time and numbers cannot be had this way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kdjax.plan
from benchmarks import harness
from benchmarks.loss import ALPHA, JSD, LIGER
from benchmarks.loss_cases import Inputs, Size, chunked, gradients, plain
from kdjax.losses import ObjectiveConfig

RESULTS = harness.RESULTS / "loss_compiled.jsonl"
TARGETS = Path(kdjax.plan.__file__).parent
SMALL = Size(1024, 512, 128, 128)
"""Of a trial."""


def shapes(size: Size, where: Any) -> Inputs:
    """Return the shapes of bf16 inputs, laid out on a device."""

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    n, v, s, t = size
    return Inputs(of(n, s), of(s, v), of(n, t), of(t, v), of(n, dtype=jnp.int32), of(n, dtype=jnp.float32))


def measure(target: str, chunks: Sequence[int], size: Size) -> list[dict[str, Any]]:
    """Return a row for each chunk size, and one for plain logits."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    text = (TARGETS / f"{target}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    where, rows = SingleDeviceSharding(topology.devices[0]), []
    for chunk in (*chunks, None):
        objective = ObjectiveConfig(ALPHA, divergence=JSD, chunk_tokens=chunk or "auto")
        loss = chunked if chunk else plain
        lowered = jax.jit(lambda x, loss=loss, objective=objective: gradients(loss, objective, x))
        sizes: Any = lowered.lower(shapes(size, where)).compile().memory_analysis()
        rows.append(
            {"what": "loss compiled", "target": target, "chunk_tokens": chunk, "divergence": JSD, "dtype": "bf16"}
            | size._asdict()
            | {"peak_bytes": sizes.peak_memory_in_bytes, "temp_bytes": sizes.temp_size_in_bytes}
            | {"argument_bytes": sizes.argument_size_in_bytes, "output_bytes": sizes.output_size_in_bytes}
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of the last run as a table."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.loss_compiled` writes the figures that stand here."
    last = [row for row in rows if row["at"] == rows[-1]["at"]]
    lines = ["| tokens of a chunk | peak GB | of it inputs | of it results |", "|:--|--:|--:|--:|"]
    for row in last:
        sizes = (row[f"{name}_bytes"] / 1e9 for name in ("peak", "argument", "output"))
        lines.append(f"| {row['chunk_tokens'] or 'plain logits'} | {' | '.join(f'{size:.2f}' for size in sizes)} |")
    here = last[0]["environment"]
    lines += ["", f"Compiled for {last[0]['target']}, never run there; jax {here['jax']}, commit {here['commit']}."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and record; return the exit code."""
    parser = harness.parser(__doc__, RESULTS)
    names = sorted(path.stem for path in TARGETS.glob("*.txtpb"))
    parser.add_argument("--target", choices=names, default="h200", help="a file of kdjax/plan")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 1024, 512], metavar="C")
    options = parser.parse_args(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin asks for a driver before it lets one compile
    try:
        rows = measure(options.target, options.chunks, SMALL if options.quick else LIGER)
    except Exception as error:
        why = str(error).partition("\n")[0]
        print(f'cannot compile for {options.target}: {why}; pip install "jax[cuda13]"', file=sys.stderr)
        return 2
    common = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "environment": harness.environment()}
    rows = [row | common for row in rows]
    if not options.quick:
        harness.append(options.results, rows)
    print(markdown(rows))
    print(json.dumps({row["chunk_tokens"] or "plain": row["peak_bytes"] for row in rows}))
    return 0


if __name__ == "__main__":
    harness.leave(main)
