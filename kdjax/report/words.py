"""What a report says in words and figures: pure functions from a run's files to text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kdjax.console import MISSING, amount, count, duration, finite, percent, small
from kdjax.report.run import Run

Show = Callable[[Any], str]
Json = Mapping[str, Any]


class Figure(NamedTuple):
    """A row of the table that compares runs."""

    label: str
    key: str
    show: Show
    best: Callable[[Sequence[float]], float] | None = None
    """Which value is the best; none where no value is better than another."""
    is_held_out: bool = False
    """Only values measured on one text compare."""


FIGURES = (
    Figure("KL to teacher before (nats)", "kl_before", amount),
    Figure("KL to teacher after (nats)", "kl_after", amount, min, True),
    Figure("top-1 agreement before", "agreement_before", percent),
    Figure("top-1 agreement after", "agreement_after", percent, max, True),
    Figure("loss of inner layers before", "features_before", amount),
    Figure("loss of inner layers after", "features_after", amount, min, True),
    Figure("recovered of the prompt", "recovered", percent, max, True),
    Figure("the same on the student's own answers", "recovered_own", percent, max),
    Figure("perplexity of the teacher", "perplexity_teacher", amount),
    Figure("bytes of the teacher", "bytes_teacher", count),
    Figure("KL from the teacher to itself quantised (nats)", "kl_quantized", small),
    Figure("top-1 agreement of both", "agreement_quantized", percent),
    Figure("perplexity before", "perplexity_before", amount),
    Figure("perplexity after", "perplexity_after", amount, min, True),
    Figure("parameters", "parameters_student", count),
    Figure("parameters that are trained", "parameters_trained", count),
    Figure("tokens/s of the model", "tokens_per_second_student", count, max),
    Figure("tokens/s in training", "tokens_per_second_train", count, max),
    Figure("time", "seconds", duration),
    Figure("steps", "steps", count),
    Figure("training tokens", "train_tokens", count),
    Figure("held-out tokens", "eval_tokens", count),
)


class Cell(NamedTuple):
    """A figure of one run."""

    text: str
    is_best: bool


def compared(runs: Sequence[Run]) -> list[tuple[str, list[Cell]]]:
    """Return label and cells (one a run) of each figure that any run has; the best is marked where values compare."""
    rows = []
    for figure in FIGURES:
        values = [finite(run.summary.get(figure.key)) for run in runs]
        known = [value for value in values if value is not None]
        compares = len(set(known)) > 1 and not (figure.is_held_out and len(held_out_texts(runs)) > 1)
        best = figure.best(known) if figure.best and compares else None
        if known:
            rows.append((figure.label, [Cell(figure.show(v), v is not None and v == best) for v in values]))
    return rows


def held_out_texts(runs: Sequence[Run]) -> list[str]:
    """Return the SHA-256 of each text that runs were measured on, `unknown` where a summary does not say."""
    return sorted({str(run.summary.get("held_out_sha256", "unknown")) for run in runs if run.summary})


def differences(configs: Sequence[Json]) -> list[tuple[str, list[str]]]:
    """Return each dotted field in which configs differ, with the value of each config."""
    flats = [_flat(config) for config in configs]
    fields = dict.fromkeys(field for flat in flats for field in flat)
    rows = [
        (field, [json.dumps(flat[field], ensure_ascii=False) if field in flat else MISSING for flat in flats])
        for field in fields
    ]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _flat(tree: Json, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def mapping(value: Any) -> dict[str, Any]:
    """Return the value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def texts(value: Any) -> list[str]:
    """Return the texts of a JSON array, or none."""
    return [str(text) for text in value] if isinstance(value, list) else []


def pretty(config: Json) -> str:
    """Return a config as indented JSON."""
    return json.dumps(config, indent=2, ensure_ascii=False)


def what(config: Json) -> str:
    """Return what was made out of what: ``smollm2-135m-instruct → 12 of its layers``."""
    student, teacher = mapping(config.get("student")), mapping(config.get("teacher"))
    kept = len(texts(student.get("keep_layers")))
    source = str(student.get("source", "a model"))
    if source == "teacher":
        made = f"{kept} of its layers" if kept else "a copy of itself"
    elif source == "random":
        shape = mapping(student.get("architecture"))
        made = f"a new {shape.get('family')} of {shape.get('layers')} layers and width {shape.get('width')}"
    else:
        made = f"{kept} layers of {source}" if kept else source
    kind, served = teacher.get("quantize", "none"), _served(config)
    taught = f"{teacher.get('source')}{'' if kind == 'none' else f' in {kind}'}" if teacher else served
    return f"{taught} → {made}" if taught else f"{made}, pre-trained"


def _served(config: Json) -> str:
    """Return what a server calls the teacher; empty without one."""
    server = mapping(config.get("teacher_server"))
    return str(server.get("model")) if server.get("source") else ""


def how(config: Json) -> list[str]:
    """Return the objective and the optimiser, a few words each."""
    objective, optimiser = mapping(config.get("objective")), mapping(config.get("optim"))
    words = {
        "divergence": str(objective.get("divergence")).replace("_", " ").replace("kl", "KL"),
        "α": objective.get("alpha"),
        "temperature": objective.get("temperature"),
    }
    words = words if (config.get("teacher") or _served(config)) and objective else {}
    student = mapping(config.get("student"))
    words |= {"LoRA of rank": mapping(student.get("lora")).get("rank") or None}
    words |= {"soft prompt, tokens:": mapping(student.get("soft_prompt")).get("tokens") or None}
    words |= {"gist, places:": student.get("gist") or None}
    words |= {"trained alone:": ", ".join(texts(student.get("trained"))) or None}
    words |= {"optimiser": optimiser.get("name"), "learning rate": optimiser.get("learning_rate")}
    words |= {"steps": config.get("steps"), "rows a batch": config.get("batch_size"), "seed": config.get("seed")}
    return [f"{name} {value}" for name, value in words.items() if value is not None]


WHEN, WHO = ("before", "after"), ("teacher", "student")


def headlines(summary: Json) -> list[tuple[str, str, str]]:
    """Return the figures that matter most: label, value, remark."""
    teacher = finite(summary.get("perplexity_teacher"))
    cards = [
        ("KL to the teacher", _pair(summary, "kl", WHEN, amount), "nats a token, held out"),
        ("Same top token", _pair(summary, "agreement", WHEN, percent), "as the teacher, held out"),
        ("Recovered of the prompt", percent(summary.get("recovered")), _interval(summary, "recovered")),
        ("Saved per request", _saved(summary), f"{percent(summary.get('recovered_own'))} recovered on its own answers"),
        (
            "Perplexity",
            _pair(summary, "perplexity", WHEN, amount),
            f"teacher {amount(teacher)}" if teacher else "held out",
        ),
        ("Parameters", _pair(summary, "parameters", WHO, count), _share(summary, "parameters")),
        (
            "Speed",
            _pair(summary, "tokens_per_second", WHO, count),
            "tokens/s" + _share(summary, "tokens_per_second", ", "),
        ),
        (
            "Quantising the teacher",
            small(summary.get("kl_quantized")),
            f"nats of KL from it whole; {count(summary.get('bytes_teacher'))} bytes",
        ),
        (
            "Time",
            duration(summary.get("seconds")),
            f"{count(summary.get('tokens_per_second_train'))} tokens/s in training",
        ),
    ]
    return [(label, value, remark) for label, value, remark in cards if value not in ("", MISSING)]


def _pair(summary: Json, stem: str, ends: tuple[str, str], show: Show) -> str:
    """Return ``before → after``, or the latter alone; nothing where that is not known."""
    first, last = (finite(summary.get(f"{stem}_{end}")) for end in ends)
    return " → ".join(show(value) for value in (first, last) if value is not None) if last is not None else ""


def _share(summary: Json, stem: str, lead: str = "") -> str:
    teacher, student = finite(summary.get(f"{stem}_teacher")), finite(summary.get(f"{stem}_student"))
    return f"{lead}{student / teacher:.2f} × the teacher's" if teacher and student is not None else ""


def _interval(summary: Json, key: str) -> str:
    """Return ``95 % interval 91.2 % to 93.0 %``, as far as it is known."""
    ends = summary.get(f"{key}_interval")
    low, high = map(percent, ends) if isinstance(ends, list) and len(ends) == 2 else (MISSING, MISSING)
    return f"95 % interval {low} to {high}, {count(summary.get(f'{key}_prompts'))} held-out prompts"


def _saved(summary: Json) -> str:
    tokens = finite(mapping(summary.get("saved")).get("prompt_tokens"))
    return "" if tokens is None else f"{count(tokens)} tokens"


def facts(summary: Json) -> list[tuple[str, str]]:
    """Return what the figures were measured on and by: name and value."""
    measured = {
        "held-out tokens": ("eval_tokens", count),
        "held-out SHA-256": ("held_out_sha256", str),
        "training tokens": ("train_tokens", count),
        "steps": ("steps", count),
    }
    known = [(name, show(summary[key])) for name, (key, show) in measured.items() if summary.get(key) is not None]
    return known + [
        (name.replace("_", " ").replace("kl", "KL"), str(value))
        for name, value in mapping(summary.get("environment")).items()
    ]


def commands(run: Run) -> list[tuple[str, str]]:
    """Return commands to reproduce the run and to go on from it: what each is for, and the command."""
    path, config = shlex.quote(str(run.path)), shlex.quote(str(run.path / "config.json"))
    again, longer, exported = (shlex.quote(f"{run.path}-{end}") for end in ("again", "longer", "hf"))
    steps = finite(run.config.get("steps"))
    rows = [
        ("the same again", f"kdjax train {config} --run-dir {again}"),
        ("ten times longer", f"kdjax train {config} --run-dir {longer} --steps {10 * int(steps)}" if steps else ""),
        ("compare the two", f"kdjax report {path} {longer}" if steps else ""),
        ("evaluate again", f"kdjax evaluate {path}"),
        ("generate text", f'kdjax generate {path} --prompt "Once upon a time"'),
        ("export for transformers", f"kdjax export {path} {exported}"),
    ]
    return [row for row in rows if row[1]]


def last_words(summary: Json) -> tuple[str, str] | None:
    """Return the prompt and how the trained model continued it, if it did."""
    texts = mapping(summary.get("continuations"))
    said = [text for who, text in texts.items() if who.endswith("after") or who.startswith("distilled")]
    return (str(summary.get("prompt", "")), str(said[0])) if said else None
