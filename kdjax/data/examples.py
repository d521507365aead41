"""What one row teaches: text, a prompt with its answer, or a conversation; as token ids with a weight each.

Weights come from where a token stands in its example, never from its value, so an end of text keeps its loss even
where it doubles as padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from kdjax.data import chat
from kdjax.data.config import DataConfig
from kdjax.data.tokenizers import Tokenizer
from kdjax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Example:
    """One row: its kind, its parts as (role, text) in order, the class of a text that has one, and what else it has."""

    kind: Literal["text", "answer", "messages"]
    parts: tuple[tuple[str, str], ...]
    label: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Of a prompt with its answer: all columns but the answer's."""

    @property
    def document(self) -> str:
        """All of its text, by which it is held out and compared."""
        return "\n".join(text for _, text in self.parts)


def to_example(record: Mapping[str, Any], config: DataConfig, where: str) -> Example:
    """Return the example in a row: the first of messages, prompt with answer, or text that its columns offer.

    Raises:
        UserError: none of the columns is there, or one holds something else than text.
    """
    if config.task == "classification":
        record = {name: record[name] for name in (config.text_field, config.label_field) if name in record}
    has = {name for name in record if record[name] is not None}
    if config.messages_field and config.messages_field in has:
        parts = _messages(record[config.messages_field], f"{where}, field {config.messages_field!r}")
        return Example("messages", parts)
    if {config.prompt_field, config.answer_field} <= has:
        asked = to_question(record, config, where)
        answer = _text(record[config.answer_field], f"{where}, field {config.answer_field!r}")
        if not answer.strip() and asked.parts[0][1].strip():
            raise UserError(f"{where}: field {config.answer_field!r} is empty, so there is nothing to learn")
        return replace(asked, parts=(asked.parts[0], ("answer", answer)))
    if config.text_field in has:
        text = _text(record[config.text_field], f"{where}, field {config.text_field!r}")
        label = _label(record, config.label_field, where) if config.task == "classification" else None
        return Example("text", (("text", text),), label)
    wanted = (
        f"{config.text_field!r}, {config.prompt_field!r} with {config.answer_field!r}, or {config.messages_field!r}"
    )
    raise UserError(
        f"{where} has no field {wanted}{did_you_mean(config.text_field, has or ['none'])}; "
        "name the column with data.text_field"
    )


def to_question(record: Mapping[str, Any], config: DataConfig, where: str) -> Example:
    """Return the example in a row, its answer left out.

    Raises:
        UserError: it has no prompt, or that is no text.
    """
    if record.get(config.prompt_field) is None:
        raise UserError(
            f"{where} has no field {config.prompt_field!r}{did_you_mean(config.prompt_field, record)}; name the column "
            "with data.prompt_field"
        )
    prompt = _text(record[config.prompt_field], f"{where}, field {config.prompt_field!r}")
    columns = {
        name: _plain(value) for name, value in record.items() if value is not None and name != config.answer_field
    }
    return Example("answer", (("prompt", prompt), ("answer", "")), columns=columns)


def group_of(record: Mapping[str, Any], config: DataConfig, where: str) -> str:
    """Return what a row shares with those that are held out together with it.

    Raises:
        UserError: it has no such column.
    """
    if record.get(config.group_field) is None:
        raise UserError(
            f"{where} has no field {config.group_field!r}{did_you_mean(config.group_field, record)}; name the column "
            "with data.group_field"
        )
    return str(_plain(record[config.group_field]))


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _text(value: Any, where: str) -> str:
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise UserError(f"{where} is a {type(value).__name__}, wanted text")
        text.encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"{where} is not UTF-8 ({error.reason} at {error.start})") from None
    return text


def _label(record: Mapping[str, Any], name: str, where: str) -> int:
    value = record.get(name)
    try:
        if value is None or isinstance(value, bool) or int(value) != float(value) or int(value) < 0:
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"{where}, field {name!r} is {value!r}; wanted the text's class, a whole number from 0; "
            "name its column with data.label_field"
        ) from None
    return int(value)


def _messages(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if isinstance(value, Mapping) and {"role", "content"} <= set(value):  # TFDS turns a list of dicts inside out
        value = [dict(role=role, content=text) for role, text in zip(value["role"], value["content"], strict=True)]
    if not isinstance(value, list | tuple | np.ndarray):
        raise UserError(f"{where} is a {type(value).__name__}, wanted a list of messages with role and content")
    parts = []
    for number, message in enumerate(value, 1):
        turn = f"{where}, message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UserError(f"{turn} needs 'role' and 'content'")
        parts.append((_text(message["role"], f"{turn}, role"), _text(message["content"], f"{turn}, content")))
    if "assistant" not in {role for role, _ in parts}:
        raise UserError(f"{where} has no turn of role 'assistant', so there is nothing to learn")
    return tuple(parts)


def encode_example(example: Example, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Return `tokens` (int32) and `weight` (float32), the weight being that of predicting the token.

    Raises:
        UserError: the chat template fails, or does not tell the assistant's turns apart.
    """
    pieces = _PIECES[example.kind](example, tokenizer)
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in pieces])
    weight = np.concatenate([np.full(len(ids), weight, np.float32) for ids, weight in pieces])
    return {"tokens": tokens, "weight": weight}


Pieces = list[tuple[list[int], float]]


def _of_text(example: Example, tokenizer: Tokenizer) -> Pieces:
    ids = tokenizer.encode(example.parts[0][1], special=True)
    return [(ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id], 1.0)]


def _of_answer(example: Example, tokenizer: Tokenizer) -> Pieces:
    (_, prompt), (_, answer) = example.parts
    return [(tokenizer.encode_prompt(prompt), 0.0), ([*tokenizer.encode(answer), tokenizer.eos_id], 1.0)]


def _of_messages(example: Example, tokenizer: Tokenizer) -> Pieces:
    messages = [{"role": role, "content": content} for role, content in example.parts]
    return [(tokenizer.encode(text), weight) for text, weight in chat.pieces(messages, tokenizer.render)]


_PIECES: dict[str, Callable[[Example, Tokenizer], Pieces]] = {
    "text": _of_text,
    "answer": _of_answer,
    "messages": _of_messages,
}
