"""A model on this machine's devices that answers prompts, and weighs answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

from kdjax.data import Tokenizer, check_fits, load_tokenizer
from kdjax.errors import UserError
from kdjax.generate import check_prompts, stream, texts
from kdjax.models import Model, Prefix, open_model, prefix_of
from kdjax.prompts.config import SpeakerConfig
from kdjax.prompts.likelihood import Tokens, log_likelihoods, log_probs
from kdjax.prompts.speaker import How, Said, Weighed
from kdjax.sharding import MeshConfig, Placement, placement

_USER = "what-the-user-says"
"""Stands for a user's turn while it is looked where the template writes it."""


class Turn(NamedTuple):
    """What was written as a user's turn, and whether it came to its end."""

    text: str
    is_over: bool


def open_local(config: SpeakerConfig) -> Local:
    """Return a local model, its weights loaded.

    Raises:
        UserError: no such model, no tokenizer, or an encoder.
    """
    file = open_model(config.source)
    if file.tokenizer is None:
        raise UserError(f"{config.source} has no tokenizer.json; wanted one beside the weights")
    if not file.config.causal:
        raise UserError(f"{config.source} is an encoder, which answers nothing; wanted a decoder")
    tokenizer, place, model = load_tokenizer(file.tokenizer), placement(MeshConfig()), Model(file.config, config.dtype)
    check_fits(tokenizer, file.config.vocab_size)
    return Local(config, model, place.load(file.tensors, model.logical_axes(), config.dtype), tokenizer, place)


@dataclass(frozen=True, eq=False)
class Local:
    """A model on this machine's devices, all of which hold it; a batch's rows are split over them."""

    config: SpeakerConfig
    model: Model
    params: Any
    tokenizer: Tokenizer
    place: Placement

    @property
    def name(self) -> str:
        """What a user calls it."""
        return self.config.source

    def say(self, prompts: Sequence[str], how: How) -> list[Said]:
        """Return what it says to each prompt; draws depend on the seed and on all prompts of the call.

        Raises:
            UserError: a prompt that is too long.
        """
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        for prompt, tokens in zip(prompts, ids, strict=True):
            self._check_length(prompt, len(tokens), how.max_new_tokens)
        check_prompts(self.model, ids, how.max_new_tokens)
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        said: dict[int, Said] = {}
        for first in range(0, len(order), self.config.batch_size):
            numbers = order[first : first + self.config.batch_size]
            said |= zip(numbers, self._batch([ids[number] for number in numbers], how, first), strict=True)
        return [said[number] for number in range(len(ids))]

    def _batch(self, ids: Sequence[Sequence[int]], how: How, first: int) -> list[Said]:
        """Return the answers of a batch, each up to the first string that stops it."""
        blocks = stream(
            self.model,
            self.params,
            ids,
            max_new_tokens=how.max_new_tokens,
            sampling=how.sampling,
            seed=how.seed,
            eos_ids=self.tokenizer.eos_ids,
            first=first,
        )
        said = [Said("", len(row)) for row in ids]
        own = {"stop": how.stop, "eos_ids": self.tokenizer.eos_ids, "max_new_tokens": how.max_new_tokens}
        for row, text, tokens, _ in texts(blocks, len(ids), lambda new: self.tokenizer.decode(new).lstrip(), **own):
            said[row] = Said(text, len(ids[row]) + tokens)
        return said

    def turns(self, count: int, how: How) -> list[Turn]:
        """Return what it writes where its chat template lets the user speak.

        Raises:
            UserError: the template does not show where.
        """
        before, marker, _ = self.tokenizer.render([{"role": "user", "content": _USER}]).partition(_USER)
        if not marker:
            raise UserError(f"the chat template of {self.name} rewrites what a user says, so no turn can be made up")
        ids = self.tokenizer.encode(before)
        self._check_length(before, len(ids), how.max_new_tokens)
        found: list[Turn] = []
        for first in range(0, count, self.config.batch_size):
            rows = min(self.config.batch_size, count - first)
            said = self._batch([ids] * rows, how, first)
            found += [Turn(one.text, one.tokens < len(ids) + how.max_new_tokens) for one in said]
        return found

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[Weighed]:
        """Return how likely each answer is after its prompt, its end not counted.

        Raises:
            UserError: a prompt that is too long, an empty answer, or an encoder-decoder.
        """
        if self.model.config.encoder_layers:
            raise UserError(f"{self.name} is an encoder-decoder; answers are weighed by decoders alone")
        prompts = {prompt: self.prompt_ids(prompt) for prompt in dict.fromkeys(prompt for prompt, _ in pairs)}
        answers = {answer: self.answer_ids(answer) for answer in dict.fromkeys(answer for _, answer in pairs)}
        ids = [(prompts[prompt], answers[answer]) for prompt, answer in pairs]
        for (prompt, _), (before, after) in zip(pairs, ids, strict=True):
            self._check_length(prompt, len(before), len(after))
        sums = log_likelihoods(
            lambda shared, asked: self._log_probs(self.params, self._prefix(shared), self.place.put_batch(asked)),
            ids,
            batch_tokens=self.config.batch_tokens,
            most=self.model.config.max_positions,
            unit=self.place.batch_devices,
            shares=not self.model.config.why_no_prefix,
        )
        return [Weighed(total, len(before), len(after)) for total, (before, after) in zip(sums, ids, strict=True)]

    @cached_property
    def _log_probs(self) -> Callable[..., Any]:
        return self.place.compile_sums(partial(log_probs, self.model))

    @cached_property
    def _prefix(self) -> Callable[[Tokens], Prefix | None]:
        """Return how the beginning of a group's rows is read: once for all its batches."""
        return lru_cache(1)(lambda shared: prefix_of(self.model, self.params, shared) if shared else None)

    def prompt_ids(self, text: str) -> list[int]:
        """Return the tokens of a prompt."""
        if self.config.chat:
            turn = [{"role": "user", "content": text}]
            return self.tokenizer.encode(self.tokenizer.render(turn, add_generation_prompt=True))
        return self.tokenizer.encode_prompt(text, is_input=self.model.config.encoder_layers > 0)

    def answer_ids(self, text: str) -> list[int]:
        """Return the tokens of an answer.

        Raises:
            UserError: there are none.
        """
        ids = self.tokenizer.encode(text if self.config.chat else f" {text}")
        if not text or not ids:
            raise UserError("an answer is empty, so it has no probability; leave that row out")
        return ids

    def _check_length(self, prompt: str, before: int, after: int) -> None:
        most = self.model.config.max_positions
        if not self.model.config.encoder_layers and before + after > most:
            raise UserError(
                f"a prompt of {before} tokens with {after} to answer is longer than the {most} positions of "
                f"{self.name}: {prompt[:60]!r}…; show fewer or shorter examples, or cut the input in its template"
            )
