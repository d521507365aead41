"""What one does with a run or a model besides training it: evaluate, generate, export."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdjax import config as configs
from kdjax import data
from kdjax.answers import answered
from kdjax.build import build
from kdjax.errors import UserError
from kdjax.evaluate import evaluate
from kdjax.generate import GREEDY, check_prompts, stream, texts
from kdjax.metrics import write_json
from kdjax.models import DType, Model, Prefix, compressed, export, open_model
from kdjax.models.adapter import export_soft_prompt
from kdjax.models.gist import places
from kdjax.models.soft_prompt import axes_of, slots
from kdjax.sampling import Sampling
from kdjax.sharding import MeshConfig, placement

log = logging.getLogger(__name__)


def evaluate_run(directory: Path) -> dict[str, Any]:
    """Return the figures of a run's best saved step on its held-out text; also written to evaluation.json there.

    Raises:
        UserError: no run, nothing saved yet, or no text held out.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a run directory: it has no config.json; `kdjax train CONFIG` makes one")
    file = open_model(str(directory))
    config = configs.load(str(directory))
    job = build(config, answered(config, directory))
    batches = job.data.evaluation(job.config.batch_size)
    if not batches:
        raise UserError(f"{directory} holds out no text to evaluate on: its data.eval_fraction is 0")
    params, frozen = {"student": replace(job.student, file=file).params(job.place, job.keys[0])}, job.frozen_teacher()
    figures = evaluate(lambda given: job.sums(params, *given), (job.given(frozen, batch) for batch in batches))
    named: dict[str, Any] = figures | {"held_out_sha256": job.data.held_out_hash}
    write_json(directory / "evaluation.json", named)
    return named


def generate_texts(
    source: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    dtype: DType = "float32",
    batch_size: int = 16,
    compress: str = "",
) -> Iterator[tuple[int, str, bool]]:
    """Yield what a model or run says after each prompt, as it comes: the prompt's number, a piece, whether it is over.

    With `chat` a prompt is a user's turn in the model's own template. A text ends before the first of `stop` in it.
    The text `compress`, or that of @FILE, stands before every prompt as the gist of a run that has one.

    Raises:
        UserError: no tokenizer, or as `generate` does.
    """
    if batch_size < 1 or "" in stop:
        raise UserError(f"batch_size is {batch_size} and stop {list(stop)}; wanted at least 1, and no empty string")
    sampling.check()
    file = open_model(source)
    if file.tokenizer is None:
        raise UserError(f"{source} has no tokenizer.json; wanted one beside the weights")
    tokenizer, place, model = data.load_tokenizer(file.tokenizer), placement(MeshConfig()), Model(file.config, dtype)
    data.check_fits(tokenizer, file.config.vocab_size)
    if chat and compress:
        raise UserError("a prompt behind a gist is plain text, as it follows the gist; leave out --chat or --compress")
    ids = [_ids(tokenizer, prompt, chat, file.config.encoder_layers > 0, bool(compress)) for prompt in prompts]
    check_prompts(model, ids, max_new_tokens, slots(file.tensors) + (places(file.tensors) if compress else 0))
    params = place.load(file.tensors, axes_of(model, file.tensors), dtype)
    prefix = _gist(model, params, tokenizer, compress) if compress else None
    for first in range(0, len(ids), batch_size):
        batch, end = ids[first : first + batch_size], tokenizer.eos_ids
        blocks = stream(
            model,
            params,
            batch,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            eos_ids=end,
            first=first,
            prefix=prefix,
        )
        shown, how = [0] * len(batch), {"stop": stop, "eos_ids": end, "max_new_tokens": max_new_tokens}
        for row, text, _, is_over in texts(blocks, len(batch), tokenizer.decode, **how):
            if text[shown[row] :] or is_over:
                yield first + row, text[shown[row] :], is_over
            shown[row] = len(text)


def _gist(model: Model, params: Any, tokenizer: data.Tokenizer, text: str) -> Prefix:
    """Return the gist of a text, or of @FILE, as a prefix; say what it saves a request."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--compress {text[1:]} cannot be read as text: {error}") from None
    ids, c = tokenizer.encode_prompt(text), model.config
    prefix = compressed(model, params, [ids])
    each = 2 * c.layers * c.kv_heads * c.head_width * prefix.k_LBPGK.dtype.itemsize
    log.info(
        "%d tokens are compressed to %d places: a request's cache has %s bytes of them in the place of %s",
        *(len(ids), prefix.tokens, f"{prefix.tokens * each:,}", f"{len(ids) * each:,}"),
    )
    return prefix


def _ids(tokenizer: data.Tokenizer, prompt: str, chat: bool, is_input: bool, goes_on: bool = False) -> list[int]:
    if goes_on:
        return tokenizer.encode(prompt)
    if not chat:
        return tokenizer.encode_prompt(prompt, is_input=is_input)
    return tokenizer.encode(tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: the field `prompt` of each line of a .jsonl file, the lines of any other.

    Raises:
        UserError: no such file, no text, or a line that is not such an object.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
    if not lines:
        raise UserError(f"{path} has no prompts; wanted one a line")
    return [_prompt(path, number, line) for number, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'{path}, line {number}: wanted an object with a text as its "prompt", got {line[:80]!r}')
    return prompt


def export_run(source: str, out: Path) -> Path:
    """Return the directory that a run (its best saved step) or model was written to: Hugging Face's, or PEFT's.

    The latter has a soft prompt alone.

    Raises:
        UserError: the run has a gist, which neither format has a place for.
    """
    file = open_model(source)
    if places(file.tensors):
        raise UserError(f"{source} has a gist, which Hugging Face's formats have no place for; use the run as it is")
    if slots(file.tensors):
        return export_soft_prompt(file, out)
    return export(file.config, file.tensors, out, file.tokenizer)
