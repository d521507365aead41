"""Conversations as text, through the model's own chat template, with the assistant's turns told apart.

Templates come from strangers: they run in jinja's sandbox; their size, their output and what + and * build are bounded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kdjax.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Used where a tokenizer brings no template of its own."""

MAX_TEMPLATE, MAX_OUTPUT = 100_000, 4_000_000
"""Characters of a template, and of what it may write or build in one operation."""

Messages = Sequence[Mapping[str, str]]
"""Turns in order, each with `role` and `content`."""

Render = Callable[..., str]
"""`render(messages, add_generation_prompt=False)`: the conversation as text."""


def pieces(messages: Messages, render: Render) -> list[tuple[str, float]]:
    """Return the rendered conversation cut into (text, weight): 1 for assistant turns with their end, 0 elsewhere.

    A turn begins where the prompt for it ends, so each piece is tokenised as it will be when the model answers.

    Raises:
        UserError: the template fails, or rewrites earlier turns, so that the turns cannot be told apart.
    """
    whole, found, done = render(messages), [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:i], add_generation_prompt=True)
        turn = render(messages[: i + 1])
        if not (turn.startswith(prompt) and whole.startswith(turn) and len(prompt) >= done):
            raise UserError(
                f"the chat template renders message {i + 1} differently once more follow or once it is answered, so "
                "the assistant's turns cannot be told apart; give a plainer one with data.chat_template"
            )
        end = len(turn.rstrip())  # the line break after the end of a turn is the template's, not the model's
        found += [(whole[done : len(prompt)], 0.0), (whole[len(prompt) : end], 1.0)]
        done = end
    return [piece for piece in [*found, (whole[done:], 0.0)] if piece[0]]


def render_chat(template: str, messages: Messages, *, add_generation_prompt: bool, **tokens: str) -> str:
    """Return the conversation as the chat template writes it, given the names of special tokens (`bos_token`, ...).

    Raises:
        UserError: the template is no valid jinja, raises, or writes too much.
    """
    values = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
    try:
        return render(template, values | tokens)
    except UserError as error:
        raise UserError(f"the chat template {error}; give another one with data.chat_template") from None


def render(template: str, values: Mapping[str, Any], *, strict: bool = False) -> str:
    """Return what a template writes; a `strict` one may only name values that there are.

    Raises:
        UserError: ``fails: …``: the template is no valid jinja, raises, or writes too much.
    """
    written, size = [], 0
    try:
        for part in _compiled(template, strict).generate(values):
            size += len(part)
            if size > MAX_OUTPUT:
                raise _too_much()
            written.append(part)
    except Exception as error:  # a stranger's template may raise anything
        raise UserError(f"fails: {str(error).rstrip('.')}") from None
    return "".join(written)


def _too_much() -> jinja2.TemplateError:
    return jinja2.TemplateRuntimeError(f"it builds more than {MAX_OUTPUT:,} characters")


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox, which also bounds what one operation builds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int) and len(text) * times > MAX_OUTPUT:
                    raise _too_much()
        elif operator == "%" and isinstance(left, str):
            raise jinja2.TemplateRuntimeError("it formats text with %")
        elif operator == "**":
            raise jinja2.TemplateRuntimeError("it computes powers")
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, str | list | tuple) and len(value) > MAX_OUTPUT:
            raise _too_much()
        return value


class _Generation(Extension):
    """The tag `{% generation %}`, with which some templates mark the assistant's words; its body stands as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


@functools.lru_cache(maxsize=8)
def _compiled(template: str, strict: bool) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise jinja2.TemplateError(f"it has {len(template):,} characters, at most {MAX_TEMPLATE:,} are read")
    undefined = jinja2.StrictUndefined if strict else jinja2.Undefined
    extensions = [LoopControlExtension, _Generation]
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions, undefined=undefined)
    environment.globals["raise_exception"] = _raise
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)
