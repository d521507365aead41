"""What a device does as devices are added: FLOPs and bytes sent, by the compiled step; and how fast data comes alone.

COMMAND: python -m benchmarks.scaling          (about 10 minutes on 2 CPU cores)

Strong scaling splits one batch over 1 to 8 forced devices, weak scaling gives each device as many rows as the one had.
FLOPs are those of the matmuls in the compiled module, loops counted as often as they run; bytes are what its
collectives send, by the algorithm of a ring. Neither depends on how fast or busy this machine is; step times of
devices that share two cores would say nothing. The pipeline's rate is that of one of N processes, which reads its own
part. Rows go to benchmarks/results/scaling.jsonl, those that are there are kept; docs/scaling.svg is drawn of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax
from matplotlib import pyplot as plt

from benchmarks import harness
from kdjax import data
from kdjax.config import Config
from kdjax.console import amount, count, percent
from kdjax.data import DataConfig, load_tokenizer
from kdjax.models import ModelConfig, ModelSpec
from kdjax.plan.abstract import abstract_batch, abstract_frozen, abstract_job
from kdjax.plan.flops import step_flops
from kdjax.plan.hlo import collectives, matmul_flops
from kdjax.plan.measure import sizes_of
from kdjax.sharding import MeshConfig

RESULTS = harness.RESULTS / "scaling.jsonl"
PICTURE = harness.ROOT / "docs" / "scaling.svg"
DEVICES = (1, 2, 4, 8)
AXES = ("data", "pmap", "fsdp", "context", "tensor")
ROWS = {"strong": lambda devices: 16, "weak": lambda devices: 4 * devices}
"""Mode -> the rows of a batch on so many devices."""
FIGURES = {"flops": ("GFLOPs of a device", 1e9), "sent_bytes": ("MB that a device sends", 1e6)}
"""Of a step: field -> what it is called, and its unit."""
TRIED = {"mode": "strong", "axis": "fsdp"}
"""The steps of a trial, on up to two devices."""
BATCHES = 100
"""Of the pipeline, timed; as many before them warm it up."""


def config(axis: str, devices: int, rows: int) -> Config:
    """Return a pair whose heads, widths and vocabulary split over eight devices, on a mesh of one axis."""
    shape: dict[str, Any] = {"vocab_size": 8192, "layers": 4, "heads": 8, "kv_heads": 8}
    mesh = MeshConfig(placement="pmap") if axis == "pmap" else replace(MeshConfig(data=1, fsdp=1), **{axis: devices})
    return Config(
        teacher=ModelSpec(architecture=ModelConfig(**shape, width=512, head_width=64, mlp_width=1536)),
        student=ModelSpec(architecture=ModelConfig(**shape, width=256, head_width=32, mlp_width=768)),
        data=DataConfig(tokenizer="bytes", sequence_length=256),
        mesh=mesh,
        batch_size=rows,
    )


def of_step(mode: str, axis: str, devices: int) -> harness.Row:
    """Return what a device computes and sends in one step."""
    wanted = config(axis, devices, ROWS[mode](devices))
    job = abstract_job(wanted, jax.devices()[:devices])
    made = job.step.lower(job.abstract_state, abstract_frozen(job), abstract_batch(job)).compile().as_text()
    sizes, mesh = sizes_of(job, "cpu"), dict(job.place.mesh.shape)
    chunks = -(-sizes.tokens // sizes.chunk)
    found = collectives(made, mesh, chunks)
    student, teacher = (named.model.config for named in (job.student, job.teacher) if named is not None)
    return {
        "batch_size": wanted.batch_size,
        "flops": matmul_flops(made, mesh, chunks),
        "flops_counted": step_flops(wanted, student, teacher).done / devices,
        "sent_bytes": sum(row.sent for row in found),
        "collectives": [asdict(row) for row in found],
    }


def of_pipeline(processes: int, rows: int = 64, length: int = 512) -> harness.Row:
    """Return the tokens a second that the first of some processes packs, of the rows that are its own."""
    text = DataConfig(sources=("python_docs",), tokenizer="bytes", sequence_length=length, task="causal_lm")
    built = data.build(text, load_tokenizer("bytes"), batch_size=rows, process_index=0, process_count=processes)
    batches = built.train(None)
    for _ in itertools.islice(batches, BATCHES):
        pass
    began = time.perf_counter()
    own = sum(batch.targets_BR.shape[0] for batch, _ in itertools.islice(batches, BATCHES))
    seconds = time.perf_counter() - began
    return {"rows_a_batch": own // BATCHES, "tokens_per_second": own * length / seconds, "seconds": seconds}


def cases() -> Iterator[harness.Row]:
    """Yield what names each row."""
    for mode, axis, devices in itertools.product(ROWS, AXES, DEVICES):
        yield {"what": "step", "mode": mode, "axis": axis, "devices": devices}
    for processes in DEVICES:
        yield {"what": "pipeline", "processes": processes}


def measured(case: harness.Row) -> harness.Row:
    """Return the row of a case."""
    if case["what"] == "pipeline":
        return of_pipeline(case["processes"])
    return of_step(case["mode"], case["axis"], case["devices"])


def of(row: harness.Row) -> tuple[str, str]:
    """Return the axis and the mode of a step's row."""
    return row["axis"], row["mode"]


def markdown(rows: Sequence[harness.Row]) -> str:
    """Return the tables of docs/scaling.md."""
    if not rows:
        return "Not measured yet: `python -m benchmarks.scaling` writes the figures that stand here."
    steps = [row for row in rows if row["what"] == "step"]
    lines = ["![FLOPs and bytes of a device](scaling.svg)", ""]
    head = "".join(f" {devices} |" for devices in DEVICES)
    for name, (title, unit) in FIGURES.items():
        lines += [f"| {title}, by devices | scaling |{head}", f"|:--|:--|{'--:|' * len(DEVICES)}"]
        for axis, mode in itertools.product(AXES, ROWS):
            own = {row["devices"]: amount(row[name] / unit) for row in steps if of(row) == (axis, mode)}
            lines.append(f"| {axis} | {mode} | " + " | ".join(own.get(n, "–") for n in DEVICES) + " |")
        lines.append("")
    excess = max((row["flops"] / row["flops_counted"] - 1 for row in steps), default=0.0)
    lines += [
        f"Beyond its even share of what [flops.py](../kdjax/plan/flops.py) counts, a device computes at most "
        f"{percent(excess)} more.",
        "",
    ]
    pipeline = [row for row in rows if row["what"] == "pipeline"]
    lines += ["| data alone: processes | rows of a batch that one reads | tokens/s of one |", "|--:|--:|--:|"]
    lines += [f"| {row['processes']} | {row['rows_a_batch']} | {count(row['tokens_per_second'])} |" for row in pipeline]
    here = rows[-1]["environment"]
    commits = ", ".join(dict.fromkeys(str(row["environment"].get("commit")) for row in rows))
    return "\n".join(
        [
            *lines,
            "",
            "Models of 8,192 tokens and 4 layers, the teacher 512 wide, the student 256; rows of 256 tokens, 16 of "
            f"them or 4 a device. {here['device']} ({here['platform']}); python {here['python']}, jax {here['jax']}; "
            f"commit {commits}.",
        ]
    )


def draw(rows: Sequence[harness.Row], path: Any = PICTURE) -> None:
    """Draw FLOPs and bytes of a device over devices, each axis a line, strong and weak scaling side by side."""
    steps = [row for row in rows if row["what"] == "step"]
    with plt.rc_context({"svg.hashsalt": "kdjax", "font.size": 9}):
        figure, places = plt.subplots(2, 2, figsize=(8, 5.6), sharex=True, layout="constrained")
        for (down, (name, (label, unit))), (across, mode) in itertools.product(
            enumerate(FIGURES.items()), enumerate(ROWS)
        ):
            place = places[down][across]
            for axis, mark in zip(AXES, "os^Dv", strict=True):
                own = [row for row in steps if of(row) == (axis, mode)]
                heights = [row[name] / unit for row in own]
                place.plot([row["devices"] for row in own], heights, marker=mark, label=axis, alpha=0.8)
            place.set_xscale("log", base=2)
            place.set_xticks(DEVICES, [str(devices) for devices in DEVICES])
            place.set_ylim(bottom=0)
            place.grid(alpha=0.3)
            place.set_title("" if down else f"{mode} scaling")
            place.set_xlabel("devices" if down else "")
            place.set_ylabel("" if across else label)
        places[0][0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not there yet."""
    options = harness.parser(__doc__, RESULTS).parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    jax.config.update("jax_platforms", "cpu")
    rows, environment = harness.kept(options), harness.environment()
    wanted = [case for case in cases() if not options.quick or (TRIED.items() <= case.items() and case["devices"] < 4)]
    for case in wanted:
        if any(case.items() <= row.items() for row in rows):
            continue
        rows.append(harness.tell(options, case | measured(case), environment))
    if not options.quick:
        draw(rows)
    return 0


if __name__ == "__main__":
    harness.leave(main)
