"""What is configured of a job on prompts: a search, or prompts made for distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdjax.errors import UserError, did_you_mean
from kdjax.models.config import DType
from kdjax.prompts.propose import METHODS
from kdjax.server import ServerConfig


@dataclass(frozen=True)
class SpeakerConfig(ServerConfig):
    """A model that is asked: a local one, or one behind a server that speaks OpenAI's protocol."""

    source: str = ""
    """A directory, run, .gguf file, known name or hub id; or where a server is: http://host:port/v1. Empty: none."""
    batch_size: int = 16
    """Answers written at once; of a server: requests under way at once."""
    chat: bool = True
    """A prompt is a user's turn in the model's own template, not plain text to go on with. A server is always asked
    so."""
    dtype: DType = "float32"
    """Of a local model's weights and arithmetic."""
    batch_tokens: int = 2048
    """Tokens read at once, over all devices, where answers are weighed and not written."""

    def check(self, name: str) -> None:
        """Check the ranges.

        Raises:
            UserError: a value outside its range, naming the field of the part `name`.
        """
        super().check(name)
        if self.batch_tokens < 1:
            raise UserError(f"{name}.batch_tokens is {self.batch_tokens}; wanted at least 1")


LEAST = {
    "rounds": 1,
    "beam": 1,
    "children": 0,
    "shots": 0,
    "budget": 1,
    "propose_rows": 1,
    "select_rows": 1,
    "test_rows": 1,
    "max_new_tokens": 1,
    "proposal_tokens": 1,
    "proposal_temperature": 0,
    "few_shot_baseline": 0,
    "seed": 0,
    "count": 1,
}
"""The lowest value of each number."""


@dataclass(frozen=True)
class PromptsConfig:
    """Everything that decides what a job on prompts finds. A recipe in configs/ returns one from ``get_config()``."""

    name: str = "prompts"
    """The run directory is runs/NAME unless --run-dir says otherwise."""
    make: Literal["search", "self_instruct", "magpie"] = "search"
    """Search for a prompt; or have the proposer make up prompts for distillation, from the instructions
    (self_instruct) or out of its own chat template (magpie)."""
    count: int = 100
    """Prompts that are made up."""
    task: Literal["generation", "classification", "question_answering", "summarising"] = "generation"
    """What the prompt is for."""
    sources: tuple[str, ...] = ("python_docs",)
    """Where rows come from, as --data.sources of train."""
    input: str = "{{ prompt }}"
    """The template that writes an example's input from a row's columns; rows where it is empty are left out."""
    answer: str = "{{ answer }}"
    """The template that writes the answer that is wanted; rows where it is empty are left out."""
    labels: tuple[str, ...] = ()
    """The answers of a classification."""
    measure: str = ""
    """What is made highest: rouge_l, token_f1, exact_match, accuracy, probability (of the right label), likelihood (of
    the answer, nats a token). Empty: the task's own."""
    balanced: bool = False
    """Whether examples of labels that have more than the rarest one are left out, so that all have as many: of a
    classification, whose accuracy else says little where one label is most of the data."""
    calibrated: bool = True
    """Whether what labels get without any content is taken off."""
    instructions: tuple[str, ...] = ()
    """Instructions to begin with: texts, or @FILE with one a line (of a .jsonl file the field "prompt" of each)."""
    methods: tuple[str, ...] = ("grips", "shots")
    """How new candidates are made, in every round: ape, paraphrase, critique (with a proposer); grips, shots."""
    rounds: int = 2
    """How often candidates are made and selected among."""
    beam: int = 3
    """Candidates that a round leaves to the next."""
    children: int = 4
    """Candidates that each method makes in a round."""
    shots: int = 3
    """Worked examples that a candidate shows, at most."""
    selector: Literal["halving", "ucb"] = "halving"
    """How evaluations are spent among candidates."""
    budget: int = 1000
    """Evaluations of a candidate at an example to select by, over all rounds."""
    propose_rows: int = 40
    """Examples to learn from and to show."""
    select_rows: int = 200
    """Examples to select by."""
    test_rows: int = 200
    """Examples to report on, once."""
    max_new_tokens: int = 32
    """Of a written answer."""
    proposal_tokens: int = 64
    """Of what proposer and critic write."""
    proposal_temperature: float = 1.0
    """At which they write."""
    few_shot_baseline: int = 3
    """Worked examples of each set in the selection of examples alone that the search is compared with, at the same
    tokens of scoring; 0 leaves it out."""
    seed: int = 0
    """Of the three parts, of draws and of intervals."""
    scorer: SpeakerConfig = SpeakerConfig()
    """The model that the prompt is for."""
    proposer: SpeakerConfig = SpeakerConfig()
    """The model that writes candidates; none: no method that needs one."""
    critic: SpeakerConfig = SpeakerConfig()
    """The model that says why a candidate fails; none: the proposer."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise UserError(f"{name} is {getattr(self, name)}; wanted at least {least}")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"unknown method {method!r}{did_you_mean(method, METHODS)}")
        if self.balanced and not self.labels:
            raise UserError("balanced is set, but there are no labels; leave it out, or name them")
        for name in ("scorer", "proposer", "critic"):
            getattr(self, name).check(name)
        name, what = ("scorer", "the prompt is for") if self.make == "search" else ("proposer", "makes up prompts")
        if not getattr(self, name).source:
            raise UserError(f"{name}.source names no model; wanted the one that {what}")


LEAST_OF_EFFECT = {"most_prompts": 1, "orders": 1, "draws": 1, "most_shots": 0, "bins": 1, "distil_seconds": 0}
"""The lowest value of each number of an analysis."""


@dataclass(frozen=True)
class EffectConfig:
    """What is found out about the effect of prompts on a task. A recipe in configs/ returns one."""

    prompts: PromptsConfig
    """Task, rows, measure and model, as in a search; its instructions are the prompts, the first is looked at closely.
    What concerns searching is not read."""
    name: str = "effect"
    """The run directory is runs/NAME unless --run-dir says otherwise."""
    candidates: str = ""
    """A search's prompts.jsonl (the winner first) or best.txt (one prompt); they take the place of the instructions."""
    most_prompts: int = 8
    """So many prompts are scored at most, the first ones."""
    orders: int = 4
    """Orders of the worked examples that are tried."""
    draws: int = 3
    """Draws of worked examples that are tried, at each number of them."""
    most_shots: int = 8
    """The number of worked examples is doubled up to this, as far as the context holds."""
    label_sets: tuple[str, ...] = ()
    """Other words for the labels, each time all of them in their order with commas between: "subject, package"."""
    bins: int = 10
    """Of confidence, for the expected calibration error."""
    distil_seconds: float = 0.0
    """What distilling the prompt takes; 0: not known."""
    distil_run: str = ""
    """A run that distilled it, whose summary.json says how long that took."""

    def __post_init__(self) -> None:
        for name, least in LEAST_OF_EFFECT.items():
            if not getattr(self, name) >= least:
                raise UserError(f"{name} is {getattr(self, name)}; wanted at least {least}")
        if self.prompts.make != "search":
            raise UserError(f"prompts.make is {self.prompts.make!r}; an analysis wants 'search'")
        if self.prompts.scorer.is_server:
            raise UserError("prompts.scorer is a server, which gives no distributions; name a local model")
        for text in self.label_sets:
            words = [word.strip() for word in text.split(",")]
            if len(words) != len(self.prompts.labels) or len(set(words)) < len(words) or "" in words:
                raise UserError(
                    f"label_sets has {text!r}; wanted {len(self.prompts.labels)} different words with commas between, "
                    f"one for each of {', '.join(self.prompts.labels) or 'no labels'}"
                )
        if self.distil_seconds and self.distil_run:
            raise UserError("distil_seconds and distil_run are both set; give one of them")
