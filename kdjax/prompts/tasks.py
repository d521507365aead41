"""What prompts are sought for: how an example is shown in a prompt, and how an answer to it is measured.

To add a task: a row in `TASKS` at the foot.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from kdjax.prompts.measures import distinct, exact_match, rouge_l, token_f1

Measure = Callable[[str, str], float]
"""``measure(said, wanted)``: from 0 to 1, more is better."""

LIKELIHOOD = "likelihood"
"""The measure that every task has: mean log-probability (nats a token) of the wanted answer."""


@dataclass(frozen=True)
class Example:
    """What is given, and the answer that is wanted."""

    input: str
    answer: str

    @cached_property
    def key(self) -> str:
        """What the example is known by: a hash of its input."""
        return hashlib.blake2b(self.input.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Candidate:
    """An instruction with worked examples in their order, and where it comes from.

    Attributes:
        text: the instruction; may be empty where there are shots.
        shots: worked examples, shown before the one that is asked.
        method: the row of `kdjax.prompts.propose.METHODS` that made it, or `given`.
        parents: the ids of those that it was made from.
    """

    text: str
    shots: tuple[Example, ...] = ()
    method: str = field(default="given", compare=False)
    parents: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def id(self) -> str:
        """A hash of what it says."""
        said = json.dumps([self.text, [[shot.input, shot.answer] for shot in self.shots]])
        return hashlib.blake2b(said.encode(), digest_size=5).hexdigest()


NONE = Candidate("")
"""No prompt: the input alone, in the words of the task."""


@dataclass(frozen=True)
class Task:
    """A kind of task.

    Attributes:
        instruction: what a person would write first.
        words: what stands before an input and before an answer.
        measures: of one answer, by name; the first is the default. Those of a task with labels come from their
            log-probabilities (`kdjax.prompts.score`), so they have no function.
        corpus: measures of all answers together, by name; reported, never selected by.
        stop: strings before which an answer ends.
        colon: what follows each of the words.
        between: what stands between an input and its answer.
        apart: what stands between instruction and examples.
    """

    instruction: str
    words: tuple[str, str]
    measures: Mapping[str, Measure | None]
    corpus: Mapping[str, Callable[[Sequence[str]], float]] = field(default_factory=dict)
    stop: tuple[str, ...] = ("\n",)
    colon: str = ":"
    between: str = "\n"
    apart: str = "\n\n"

    @property
    def has_labels(self) -> bool:
        """Whether an answer is the likeliest of some labels, and nothing is generated."""
        return None in self.measures.values()


def show(task: Task, candidate: Candidate, query: str) -> str:
    """Return the prompt: instruction, worked examples, the input that is asked, each after a blank line."""
    given, wanted = (f"{word}{task.colon}" for word in task.words)
    shots = [f"{given} {shot.input}{task.between}{wanted} {shot.answer}" for shot in candidate.shots]
    asked = f"{given} {query}{task.between}{wanted}"
    return task.apart.join(part for part in [candidate.text, *shots, asked] if part)


def template(task: Task, candidate: Candidate, query: str, chat: bool) -> str:
    """Return the jinja template that writes `show` of a row, and is a view for distillation (`kdjax.data.views`).

    Args:
        task: whose words are used.
        candidate: what is shown before the input.
        query: the template that writes the input from a row's columns.
        chat: whether the prompt is a user's turn.
    """
    mark = "\0"
    text = re.sub(r"\{(?=[{%#])", '{{ "{" }}', show(task, candidate, mark)).replace(mark, query)
    if not chat:
        return text + "\n"
    return f'{{% set turn %}}\n{text}{{% endset %}}\n{{{{ chat([{{"role": "user", "content": turn}}]) }}}}\n'


def short(candidate: Candidate) -> str:
    """Return the beginning of a candidate's instruction, and how many examples it shows."""
    text = " ".join(candidate.text.split())
    shots = f" + {len(candidate.shots)} examples" if candidate.shots else ""
    return repr(text if len(text) <= 70 else text[:69] + "…") + shots


TASKS: dict[str, Task] = {
    "generation": Task(
        "Continue as the examples do.",
        ("Input", "Output"),
        {"rouge_l": rouge_l},
        {"distinct_1": partial(distinct, n=1), "distinct_2": partial(distinct, n=2)},
        stop=("\n\n",),
    ),
    "classification": Task(
        "Say which label fits the text.",
        ("Text", "Label"),
        {"accuracy": None, "probability": None},
    ),
    "question_answering": Task(
        "Answer the question in a few words.",
        ("Question", "Answer"),
        {"token_f1": token_f1, "exact_match": exact_match},
    ),
    "summarising": Task(
        "Summarise the text in one line.",
        ("Text", "Summary"),
        {"rouge_l": rouge_l},
    ),
}
"""Kinds of task by name."""
