"""What one does with a run or a model besides training it: evaluate, generate, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdjax import config as configs
from kdjax import data
from kdjax.build import build
from kdjax.errors import UserError
from kdjax.evaluate import evaluate
from kdjax.generate import generate
from kdjax.metrics import write_json
from kdjax.models import Model, export, open_model
from kdjax.sharding import MeshConfig, placement


def evaluate_run(directory: Path) -> dict[str, Any]:
    """Return the figures of a run's best saved step on its held-out text; also written to evaluation.json there.

    Raises:
        UserError: no run, nothing saved yet, or no text held out.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a run directory: it has no config.json; `kdjax train CONFIG` makes one")
    file = open_model(str(directory))
    job = build(configs.load(str(directory)))
    batches = job.data.evaluation(job.config.batch_size)
    if not batches:
        raise UserError(f"{directory} holds out no text to evaluate on: its data.eval_fraction is 0")
    params, frozen = {"student": replace(job.student, file=file).params(job.place, job.keys[0])}, job.frozen()
    figures = evaluate(lambda batch: job.sums(params, frozen, batch), map(job.place.put_batch, batches))
    named: dict[str, Any] = figures | {"held_out_sha256": job.data.held_out_hash}
    write_json(directory / "evaluation.json", named)
    return named


def generate_text(
    source: str, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int, chat: bool
) -> str:
    """Return what a model or run says after a prompt; with `chat` the prompt is a user's turn in its own template."""
    file = open_model(source)
    if file.tokenizer is None:
        raise UserError(f"{source} has no tokenizer.json; wanted one beside the weights")
    tokenizer, place, model = data.load_tokenizer(file.tokenizer), placement(MeshConfig()), Model(file.config)
    data.check_fits(tokenizer, file.config.vocab_size)
    turn = [{"role": "user", "content": prompt}]
    ids = (
        tokenizer.encode(tokenizer.render(turn, add_generation_prompt=True))
        if chat
        else tokenizer.encode_prompt(prompt, is_input=file.config.encoder_layers > 0)
    )
    params = place.load(file.tensors, model.logical_axes(), "float32")
    new = generate(
        model,
        params,
        [ids],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eos_ids=tokenizer.eos_ids,
    )
    return tokenizer.decode(new[0])


def export_run(source: str, out: Path) -> Path:
    """Return the Hugging Face directory that a run (its best saved step) or model was written to."""
    file = open_model(source)
    return export(file.config, file.tensors, out, file.tokenizer)
