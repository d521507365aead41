"""What of an example is predicted: for each task of a model a function from examples to token ids, targets and weights.

A causal language model's targets are the tokens that follow, which `to_batch` finds once rows are packed; all others
bring `targets` that lie where they are predicted. A decoder beside an encoder brings the encoder's `inputs` too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdjax.data.across import encode_across
from kdjax.data.examples import Example, encode_example
from kdjax.data.tokenizers import Tokenizer
from kdjax.data.views import Views, encode_views
from kdjax.errors import UserError

Encoded = dict[str, np.ndarray]
"""`tokens`, `weight`, and maybe `targets` and `inputs` by token, of one example."""


@dataclass(frozen=True)
class Facts:
    """What a task must know besides an example.

    Attributes:
        tokenizer: the model's.
        mask_fraction: share of the tokens that a masked language model is to find.
        inputs: tokens that an encoder takes; a longer text is cut, unless rows are to take it in parts.
        targets: tokens that a decoder beside it takes.
        start_token: the token that a decoder beside an encoder begins with.
        labels: how many classes there are.
        views: what is seen before an answer, where templates say so.
        room: tokens that each answer has room for at least.
        shared: the tokens that the teacher's views of all rows begin with, and that rows leave out.
        teacher_tokenizer: of a teacher that has another one.
        teacher_inputs: tokens of its rows.
    """

    tokenizer: Tokenizer
    mask_fraction: float = 0.15
    inputs: int = 512
    targets: int = 512
    start_token: int = 0
    labels: int = 0
    views: Views | None = None
    room: int = 0
    shared: tuple[int, ...] = ()
    teacher_tokenizer: Tokenizer | None = None
    teacher_inputs: int = 512


def causal_lm(example: Example, facts: Facts, random: np.random.Generator) -> Encoded:
    """Return the tokens, each weighing what predicting it weighs; of two views or tokenizers, where there are some."""
    del random
    if facts.teacher_tokenizer is not None:
        return encode_across(
            example, facts.tokenizer, facts.teacher_tokenizer, facts.views, (facts.inputs, facts.teacher_inputs)
        )
    if facts.views is not None:
        return encode_views(example, facts.tokenizer, facts.views, facts.shared, facts.room)
    return encode_example(example, facts.tokenizer)


def masked_lm(example: Example, facts: Facts, random: np.random.Generator) -> Encoded:
    """Return the tokens with some of them hidden, and these as what is to be found.

    Of the tokens that are chosen 80 % become the mask token, 10 % a random one, and 10 % stay. Special tokens, and what
    has no weight (a prompt), are never chosen. Paper: Devlin et al. 2018, BERT, arXiv:1810.04805, section 3.1.
    """
    if (mask_id := facts.tokenizer.mask_id) is None:
        raise UserError("the tokenizer has no mask token ([MASK] or <mask>); use that of a masked language model")
    encoded = encode_example(example, facts.tokenizer)
    tokens, count = encoded["tokens"], len(encoded["tokens"])
    may = (encoded["weight"] > 0) & ~np.isin(tokens, list(facts.tokenizer.special_ids))
    chosen, way = may & (random.random(count) < facts.mask_fraction), random.random(count)
    other = random.integers(0, facts.tokenizer.size, count, np.int32)
    hidden = np.where(way < 0.8, np.int32(mask_id), np.where(way < 0.9, other, tokens))
    seen = np.where(chosen, hidden, tokens).astype(np.int32)
    return {"tokens": seen, "targets": tokens, "weight": chosen.astype(np.float32)}


def embedding(example: Example, facts: Facts, random: np.random.Generator) -> Encoded:
    """Return the tokens, of a long text the first and the end, all of which weigh the same: nothing is predicted."""
    del random
    tokens = _cut(encode_example(example, facts.tokenizer)["tokens"], facts.inputs)
    return {"tokens": tokens, "targets": tokens, "weight": np.ones(len(tokens), np.float32)}


def classification(example: Example, facts: Facts, random: np.random.Generator) -> Encoded:
    """Return the tokens, of a long text the first and the end; the first of them is where the label is predicted."""
    del random
    if example.label is None:
        raise UserError("it has no label, which classification wants; name its column with data.label_field")
    if example.label >= facts.labels:
        raise UserError(f"its label is {example.label}; the model tells {facts.labels} classes apart, from 0")
    tokens = _cut(encode_example(example, facts.tokenizer)["tokens"], facts.inputs)
    targets, weight = np.zeros_like(tokens), np.zeros(len(tokens), np.float32)
    targets[0], weight[0] = example.label, 1
    return {"tokens": tokens, "targets": targets, "weight": weight}


def _cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return the tokens, if there are too many the first of them with the last, which ends the text."""
    return tokens if len(tokens) <= length else np.concatenate([tokens[: length - 1], tokens[-1:]])


def seq2seq(example: Example, facts: Facts, random: np.random.Generator) -> Encoded:
    """Return what the encoder reads, and what the decoder is to say to it: a prompt's answer, or how a text goes on.

    A text is cut at a random place, and as much of it is taken on either side as fits.
    Paper: Raffel et al. 2019, T5, arXiv:1910.10683, section 3.2.1 (prefix language modelling by an encoder-decoder).
    """
    end = facts.tokenizer.eos_id
    if example.kind == "messages":
        raise UserError(
            "a conversation is no pair of input and output; seq2seq takes a prompt with its answer, or text"
        )
    parts = [facts.tokenizer.encode(text) for _, text in example.parts]
    if len(parts) == 1:
        place = int(random.integers(1, max(2, len(parts[0]))))
        parts = [parts[0][max(0, place - facts.inputs + 1) : place], parts[0][place : place + facts.targets - 1]]
    inputs, answer = (np.array([*ids, end], np.int32) for ids in parts)
    tokens = np.concatenate([np.array([facts.start_token], np.int32), answer[:-1]])
    return {"inputs": inputs, "tokens": tokens, "targets": answer, "weight": np.ones(len(answer), np.float32)}


TASKS: dict[str, Callable[[Example, Facts, np.random.Generator], Encoded]] = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "embedding": embedding,
    "classification": classification,
    "seq2seq": seq2seq,
}
"""`DataConfig.task` -> how an example becomes tokens, targets and weights. A draw goes by the example's place alone."""
