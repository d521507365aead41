"""What teacher and student see before one and the same answer: templates of a row's columns (context distillation).

A template writes all that stands before the answer. `chat(messages)` in it writes these as the tokenizer's own chat
template does, up to where the assistant speaks. Paper: Snell et al. 2022, arXiv:2209.15189.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.data.chat import render
from kdjax.data.config import DataConfig
from kdjax.data.examples import Example
from kdjax.data.tokenizers import Tokenizer
from kdjax.errors import UserError
from kdjax.shapes import gist_places

SCRATCHPAD = "scratchpad"
"""The column of what a teacher wrote before its answer; in a template it is empty where a row has none."""


_MARK = "\ue000gist\ue000"
"""What stands in a rendered text for the places of a gist."""


@dataclass(frozen=True)
class Views:
    """Two templates; an empty one of the student is the row's prompt, of the teacher what the student sees.

    With a `gist` of so many places the student's says {{ gist }} once, where these stand.
    """

    student: str = ""
    teacher: str = ""
    gist: int = 0


def load_views(config: DataConfig, gist: int = 0) -> Views | None:
    """Return the templates of a config, read where they name a file; None where it has none.

    Raises:
        UserError: a file that cannot be read.
    """
    if not config.has_views:
        return None
    student, teacher = (_template(name, getattr(config, name)) for name in ("student_view", "teacher_view"))
    return Views(student, teacher, gist)


def _template(name: str, text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"data.{name} {text[1:]} cannot be read: {error}") from None


def encode_views(
    example: Example, tokenizer: Tokenizer, views: Views, shared: Sequence[int] = (), room: int = 0
) -> dict[str, np.ndarray]:
    """Return `tokens` and `weight` of the student's view, and of the teacher's if it has its own; answers weigh 1.

    The teacher's view is returned without the tokens that all rows' begin with, `shared`. After a shorter answer there
    is `room` for another one of so many tokens, of weight 0.

    Raises:
        UserError: no prompt with an answer, a template that fails, an answer that is other tokens in the two views, or
            a teacher's view that does not begin with what is shared and go on.
    """
    _check_kind(example)
    prompt, answer = seen("student", views.student or "{{ prompt }}", example, tokenizer, views.gist)
    spare = [tokenizer.eos_id] * (room - len(answer))
    encoded = _weighed("", prompt, answer, spare)
    if not views.teacher:
        return encoded
    other, same = seen("teacher", views.teacher, example, tokenizer)
    if answer != same:
        raise UserError(
            f"its answer is other tokens in the teacher's view ({len(same)}) than in the student's ({len(answer)}), so "
            "they cannot be compared one by one; use chat() in both views or in neither"
        )
    if other[: len(shared)] != list(shared) or len(other) == len(shared):
        raise UserError(
            f"its teacher's view does not begin with the {len(shared)} tokens that other rows' begin with, and go on; "
            "mend data.teacher_view, or set data.share_prefix to False"
        )
    return encoded | _weighed("teacher_", other[len(shared) :], same, spare)


def _check_kind(example: Example) -> None:
    if example.kind != "answer":
        raise UserError(f"it is {example.kind}, but views are of a prompt with its answer; give a row both columns")


def encode_question(example: Example, tokenizer: Tokenizer, views: Views) -> tuple[list[int], list[int]]:
    """Return the tokens before the answer, as the student sees them and as the teacher does.

    Raises:
        UserError: a template that fails, or writes nothing.
    """
    student = seen("student", views.student or "{{ prompt }}", example, tokenizer, views.gist)[0]
    return student, seen("teacher", views.teacher, example, tokenizer)[0] if views.teacher else student


def read_prompt(path: Path) -> str:
    """Return the prompt in a file.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    try:
        prompt = path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"prompt_file {path} cannot be read: {error}") from None
    if not prompt.strip():
        raise UserError(f"prompt_file {path} is empty; write the prompt that is to be distilled into it")
    return prompt


def system_views(prompt: str) -> Views:
    """Return the views of a prompt: the teacher has it as the system's turn before the row's, the student only that."""
    turns = '{"role": "user", "content": prompt}'
    system = f'{{"role": "system", "content": {json.dumps(prompt.strip(), ensure_ascii=False)}}}'
    return Views(f"{{{{ chat([{turns}]) }}}}", f"{{{{ chat([{system}, {turns}]) }}}}")


def _weighed(prefix: str, prompt: Sequence[int], answer: Sequence[int], spare: Sequence[int]) -> dict[str, np.ndarray]:
    weight = np.zeros(len(prompt) + len(answer) + len(spare), np.float32)
    weight[len(prompt) : len(prompt) + len(answer)] = 1
    return {f"{prefix}tokens": np.array([*prompt, *answer, *spare], np.int32), f"{prefix}weight": weight}


def teacher_prompts(examples: Iterable[Example], tokenizer: Tokenizer, views: Views) -> Iterator[Written]:
    """Yield what the teacher sees before each answer; what cannot be a view is left to `encode_views` to refuse."""
    for example in examples:
        try:
            _check_kind(example)
            yield written("teacher", views.teacher, example, tokenizer)
        except UserError:
            continue


@dataclass(frozen=True)
class Written:
    """What a view writes before an answer, and the answer's turn where chat() wrote it; None: where it did not.

    With a `gist` of so many places, these stand in it.
    """

    text: str
    spoken: str | None = None
    gist: int = 0

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Return the tokens before the answer; text on either side of a gist is tokenised apart."""
        first = tokenizer.encode_prompt if self.spoken is None else tokenizer.encode
        before, _, after = self.text.partition(_MARK)
        return [*first(before), *gist_places(self.gist), *(tokenizer.encode(after) if after else ())]


def written(whose: str, template: str, example: Example, tokenizer: Tokenizer, gist: int = 0) -> Written:
    """Return what a template writes of an example, where a `gist` is to have so many places.

    Raises:
        UserError: it fails, or a gist does not stand between two texts.
    """
    spoken: list[str] = []
    (_, prompt), (_, answer) = example.parts

    def chat(messages: Sequence[Mapping[str, Any]]) -> str:
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in messages]
        before = tokenizer.render(turns, add_generation_prompt=True)
        whole = tokenizer.render([*turns, {"role": "assistant", "content": answer}])
        if not whole.startswith(before):
            raise UserError("the chat template writes a prompt differently once it is answered")
        spoken.append(whole[len(before) :].rstrip())  # the line break after a turn is the template's, not the model's
        return before

    try:
        values = {SCRATCHPAD: "", **example.columns, "prompt": prompt, "chat": chat}
        text = render(template, values | ({"gist": _MARK} if gist else {}), strict=True)
    except UserError as error:
        raise UserError(f"the {whose}'s view {error}; mend data.{whose}_view") from None
    if gist and (text.count(_MARK) != 1 or not all(text.split(_MARK))):
        raise UserError(
            f"the {whose}'s view has the gist {text.count(_MARK)} times; wanted {{{{ gist }}}} once in "
            f"data.{whose}_view, with the prompt before it and something after it"
        )
    return Written(text, spoken[-1] if spoken else None, gist)


def seen(
    whose: str, template: str, example: Example, tokenizer: Tokenizer, gist: int = 0
) -> tuple[list[int], list[int]]:
    """Return the tokens before the answer, and those of the answer with its end: of a turn, where chat() wrote it."""
    view = written(whose, template, example, tokenizer, gist)
    ids, (_, answer) = view.tokens(tokenizer), example.parts[1]
    if not ids:
        raise UserError(f"the {whose}'s view is empty, so nothing predicts the answer's first token; write something")
    end = [*tokenizer.encode(answer), tokenizer.eos_id] if view.spoken is None else tokenizer.encode(view.spoken)
    return ids, end
