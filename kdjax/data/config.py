"""What the data part can be told; the one place where its settings are checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from kdjax.errors import UserError

Packing = Literal["concat", "first_fit"]
Task = Literal["auto", "causal_lm", "masked_lm", "classification", "seq2seq", "embedding"]


_LIMITS = {
    "sequence_length": (2, math.inf),
    "target_length": (0, math.inf),
    "teacher_length": (0, math.inf),
    "mask_fraction": (0.001, 0.999),
    "eval_fraction": (0.0, 0.999),
    "eval_tokens": (1, math.inf),
    "dedupe_ngram": (0, math.inf),
    "max_bad_rows": (0, math.inf),
    "max_shards": (1, math.inf),
}


@dataclass(frozen=True)
class DataConfig:
    """The text to train on, how it is cut into rows, and what is held out."""

    sources: tuple[str, ...] = ("python_docs",)
    """Where examples come from: `python_docs`, `python_questions`, `python_passages`, `invented` or `invented:SEED`
    (towns that do not exist), `text:PATH`, `jsonl:PATH`, `parquet:PATH` (a PATH may be a glob),
    `tfds:NAME_OR_DIRECTORY` or `tfds:NAME_OR_DIRECTORY@SPLIT`."""
    weights: tuple[float, ...] = ()
    """Share of the examples drawn from each source; empty takes all examples together, each once an epoch."""
    tokenizer: str = ""
    """Empty takes the model's; `bytes`, a tokenizer.json, or a directory that has one."""
    teacher_tokenizer: str = ""
    """Of a teacher that has another tokenizer than the student: `own` is the one that comes with it, otherwise as
    above. Both are then compared where their tokens have a common border; a text that is longer than a row is cut.
    Empty: they have one."""
    chat_template: str = ""
    """A file with a jinja template for `messages`; empty takes the tokenizer's own, or ChatML."""
    task: Task = "auto"
    """What of an example is predicted, a row of kdjax.data.tasks.TASKS; auto: what the student is made for."""
    mask_fraction: float = 0.15
    """masked_lm: the share of the tokens that is to be found."""
    sequence_length: int = 256
    """Tokens of a row; beside an encoder, of the encoder's."""
    student_view: str = ""
    """What the student sees before an answer: a jinja template, or @FILE with one; empty is the row's prompt."""
    teacher_view: str = ""
    """What the teacher sees before it; empty is what the student sees."""
    teacher_length: int = 0
    """Tokens of a row of the teacher's view, without what is shared, or of its own tokens; 0 is as many as the
    student's."""
    share_prefix: bool = True
    """The teacher reads what all its views begin with once a run, and rows leave it out; False: it is in each row."""
    target_length: int = 0
    """seq2seq: tokens of a decoder's row; 0 is as many as the encoder's."""
    packing: Packing = "concat"
    """`concat` wastes nothing, and a long document goes on in the next row; `first_fit` never cuts an example, which
    prompts with answers and messages need."""
    eval_fraction: float = 0.05
    """Share of the documents held out for evaluation, chosen by a hash of their text; 0 holds out none."""
    eval_tokens: int = 16_384
    """Tokens of held-out text that an evaluation reads, at most."""
    dedupe_ngram: int = 13
    """Held-out documents that share so many words in a row with a training document are dropped; 0 keeps them, and
    saves reading all text a second time at the start."""
    group_field: str = ""
    """Examples that share this column's value (of one book, one user) are held out together; empty holds out each by
    its own text."""
    split_seed: int = 0
    """Of the choice of held-out documents."""
    seed: int = 0
    """Of the order, so that runs with other orders still share their held-out text."""
    text_field: str = "text"
    """The column of plain text. An example is the first of messages, prompt with answer, or text that a row has; an
    empty name leaves that kind out."""
    prompt_field: str = "prompt"
    """The column of prompts, which carry no loss."""
    answer_field: str = "answer"
    """The column of answers, which carry the loss."""
    messages_field: str = "messages"
    """The column of conversations (lists of role and content); the loss is on the assistant's turns."""
    label_field: str = "label"
    """classification: the column of the text's class, a whole number from 0."""
    max_bad_rows: int = 0
    """Unreadable or over-long rows that are skipped and counted before they are an error."""
    max_shards: int = 64
    """Most pieces that the data is dealt into; a run may use as many processes, and change their number."""

    @property
    def has_views(self) -> bool:
        """Prompts are written by templates."""
        return bool(self.student_view or self.teacher_view)

    @property
    def has_teacher_rows(self) -> bool:
        """The teacher's rows have other tokens than the student's."""
        return bool(self.teacher_view or self.teacher_tokenizer)

    @property
    def lengths(self) -> dict[str, int]:
        """The length of each part of a row."""
        if self.task == "causal_lm" or self.task == "auto":
            more = ("chunk",) if self.teacher_tokenizer else ()
            names = ("teacher_tokens", "teacher_weight", *(f"teacher_{name}" for name in more))
            own = dict.fromkeys(names if self.has_teacher_rows else (), self.teacher_length or self.sequence_length)
            return own | dict.fromkeys(("tokens", "weight", *more), self.sequence_length)
        if self.task != "seq2seq":
            return dict.fromkeys(("tokens", "weight", "targets"), self.sequence_length)
        own = dict.fromkeys(("tokens", "weight", "targets"), self.target_length or self.sequence_length)
        return own | {"inputs": self.sequence_length}

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, (low, high) in _LIMITS.items():
            if not low <= values[name] <= high:
                bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"data.{name} is {values[name]}; it must be {bound}")
        if self.packing not in get_args(Packing):
            raise UserError(f"data.packing is {self.packing!r}; it must be one of {', '.join(get_args(Packing))}")
        if self.task not in get_args(Task):
            raise UserError(f"data.task is {self.task!r}; it must be one of {', '.join(get_args(Task))}")
        if self.task in ("classification", "seq2seq") and self.packing != "first_fit":
            raise UserError(
                f"packing {self.packing!r} would cut the examples of {self.task}; set data.packing to first_fit"
            )
        if self.has_views and (self.packing != "first_fit" or self.task not in ("auto", "causal_lm")):
            raise UserError(
                f"views are of prompts with answers, for causal_lm in rows of first_fit; data.task is {self.task!r} "
                f"and data.packing {self.packing!r}: set data.packing to first_fit, or leave out the views"
            )
        if self.teacher_tokenizer and (
            self.packing != "first_fit" or self.task not in ("auto", "causal_lm") or self.teacher_view
        ):
            raise UserError(
                "data.teacher_tokenizer is for causal_lm in rows of first_fit that both models see alike; data.task is "
                f"{self.task!r}, data.packing {self.packing!r}, and data.teacher_view {self.teacher_view[:40]!r}: set "
                "data.packing to first_fit, and leave out the teacher's view"
            )
        if not self.sources:
            raise UserError("data.sources is empty; name at least one, python_docs for example")
        if self.weights and len(self.weights) != len(self.sources):
            raise UserError(f"data.weights has {len(self.weights)} numbers for {len(self.sources)} sources")
        if not all(weight > 0 and math.isfinite(weight) for weight in self.weights):
            raise UserError(
                f"data.weights is {self.weights}; each must be above 0 (leave a source out to give it none)"
            )
