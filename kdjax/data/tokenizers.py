"""Tokenizers: a thin face over the `tokenizers` package, and the few facts around a tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers

from kdjax.data.chat import CHATML, Messages, render_chat
from kdjax.errors import UserError

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
"""Known names of the token that ends a text or a turn, in the order in which they are tried when no file names it."""

_MASKS = ("[MASK]", "<mask>")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with what its model needs besides.

    Attributes:
        backend: of the `tokenizers` package.
        eos_id: the token that ends a text.
        bos_token: begins a text, for chat templates; empty where there is none.
        chat_template: jinja; ChatML where the tokenizer brings none.
    """

    backend: hf.Tokenizer
    eos_id: int
    bos_token: str = ""
    chat_template: str = CHATML

    @property
    def eos_token(self) -> str:
        """The token that ends a text, as text."""
        return self.backend.id_to_token(self.eos_id) or ""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens at which an answer ends: the end of a text, and known ends of a turn."""
        known = (self.backend.token_to_id(name) for name in _ENDS)
        return tuple(dict.fromkeys([self.eos_id, *(found for found in known if found is not None)]))

    @cached_property
    def mask_id(self) -> int | None:
        """The token that hides another from a masked language model; None without one."""
        known = (self.backend.token_to_id(name) for name in _MASKS)
        return next((found for found in known if found is not None), None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """All tokens that stand for no text."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def size(self) -> int:
        """The smallest vocabulary that has all ids."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def sha256(self) -> str:
        """The hash of which id stands for which piece of text; only where it is the same can two models be compared."""
        rows = sorted((i, token) for token, i in self.backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text; `special` adds what the tokenizer itself puts around a text (a BOS, say)."""
        # The batched call lets go of Python's lock and skips offsets: other threads run on, and it takes half the time.
        return self.backend.encode_batch_fast([text], add_special_tokens=special)[0].ids

    def encode_prompt(self, text: str, *, is_input: bool = False) -> list[int]:
        """Return the ids of a text that is to be continued: with the tokenizer's BOS, without its end of text.

        An encoder's input, which a decoder answers, is a whole text: it has its end.
        """
        ids = self.encode(text, special=True)
        ids = ids[:-1] if ids[-1:] == [self.eos_id] else ids
        return [*ids, self.eos_id] if is_input else ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of ids, with special tokens or without."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Return a conversation as text that has its special tokens in it, so `encode` it without further ones.

        Raises:
            UserError: the chat template fails.
        """
        names = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return render_chat(self.chat_template, messages, add_generation_prompt=add_generation_prompt, **names)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer` and transformers read."""
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos_token}
        if self.bos_token:
            settings["bos_token"] = self.bos_token
        if self.chat_template != CHATML:
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, "utf-8")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Return the tokenizer `bytes`, that of a tokenizer.json, or that of a directory which has one.

    Raises:
        UserError: no such file, a broken one, or no token that ends a text.
    """
    if str(source) == "bytes":
        return byte_tokenizer()
    path = Path(source).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}; give `bytes`, a tokenizer.json, or a directory that has one")
    try:
        backend = hf.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f"{path} is no readable tokenizer.json: {error}") from None
    backend.no_truncation()  # some files ask for it, and it would cut documents silently
    backend.no_padding()
    settings = _json(path.parent / "tokenizer_config.json")
    return Tokenizer(
        backend=backend,
        eos_id=_end_of_text(backend, settings, path),
        bos_token=_token(settings.get("bos_token")),
        chat_template=_template(path.parent / "chat_template.jinja", settings),
    )


def byte_letters() -> dict[int, str]:
    """Return the letter by which a byte-level vocabulary shows each byte (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # those that it shows as they are
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids 0 to 255 are the bytes of UTF-8, followed by four special tokens."""
    letters = byte_letters()
    backend = hf.Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<mask>"])
    return Tokenizer(backend, eos_id=256)


def with_template(tokenizer: Tokenizer, path: str) -> Tokenizer:
    """Return the tokenizer with the chat template in a file; as it is, where none is named.

    Raises:
        UserError: the file cannot be read.
    """
    if not path:
        return tokenizer
    try:
        return replace(tokenizer, chat_template=Path(path).expanduser().read_text("utf-8"))
    except (OSError, UnicodeError) as error:
        raise UserError(f"data.chat_template {path} cannot be read: {error}") from None


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that a model has a row for every id.

    Raises:
        UserError: it has not.
    """
    if tokenizer.size > vocab_size:
        raise UserError(
            f"the tokenizer does not fit the model: it has ids up to {tokenizer.size - 1} but the model's vocabulary "
            f"is {vocab_size}; use the model's own tokenizer, or a vocabulary of at least {tokenizer.size}"
        )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no readable JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _token(value: Any) -> str:
    text = value.get("content", "") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _template(path: Path, settings: dict[str, Any]) -> str:
    if path.is_file():
        return path.read_text("utf-8")
    value = settings.get("chat_template")
    if isinstance(value, list):  # several named ones
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}.get("default")
    return value if isinstance(value, str) and value else CHATML


def _end_of_text(backend: hf.Tokenizer, settings: dict[str, Any], path: Path) -> int:
    """Return the id of the end of text: named beside the tokenizer, in the model's config, or a known name."""
    named = _token(settings.get("eos_token"))
    ids = _json(path.parent / "config.json").get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    for found in [backend.token_to_id(named), *ids, *(backend.token_to_id(name) for name in (*_ENDS, "[SEP]"))]:
        if isinstance(found, int) and backend.id_to_token(found) is not None:
            return found
    raise UserError(
        f"{path}: no token that ends a text is known; name it as eos_token in a tokenizer_config.json beside it"
    )
