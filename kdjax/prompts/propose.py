"""Where candidates come from: models that write instructions, edits of good ones, and sets of worked examples.

To add a method: a function of (workshop, parents, count, draw), and a row in `METHODS` at the foot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from kdjax.errors import UserError
from kdjax.prompts.speaker import How, Speaker
from kdjax.prompts.tasks import Candidate, Example, Task
from kdjax.sampling import Sampling

SHOWN = 4
"""Examples that a model is shown when it writes or mends an instruction."""


@dataclass(frozen=True)
class Workshop:
    """What candidates are made with.

    Attributes:
        task: what they are for.
        examples: to learn from and to show; no other examples are seen.
        failures: the examples that a candidate does worst at, with what was said; only those that could be better.
        proposer: writes instructions; or None.
        critic: says what is wrong with one; or None.
        shots: worked examples of a candidate, at most.
        how: how proposer and critic write.
    """

    task: Task
    examples: Sequence[Example]
    failures: Callable[[Candidate], Sequence[tuple[Example, str]]]
    proposer: Speaker | None = None
    critic: Speaker | None = None
    shots: int = 0
    how: How = How(64, sampling=Sampling(1.0))  # noqa: RUF009 (a constant)


Method = Callable[[Workshop, Sequence[Candidate], int, Random], list[Candidate]]


def propose(
    workshop: Workshop, methods: Sequence[str], parents: Sequence[Candidate], count: int, seed: str
) -> list[Candidate]:
    """Return up to `count` new candidates by each method, none twice and none of the parents.

    Draws depend on the seed and the method's name alone.
    """
    found: dict[str, Candidate] = {}
    for method in methods:
        for child in METHODS[method](workshop, parents, count, Random(f"{seed} {method}")):
            found.setdefault(child.id, replace(child, method=method))
    return [child for id, child in found.items() if id not in {parent.id for parent in parents}]


def ape(workshop: Workshop, parents: Sequence[Candidate], count: int, draw: Random) -> list[Candidate]:
    """Return instructions that the proposer guesses from examples.

    Paper: Zhou et al. 2022, Large Language Models Are Human-Level Prompt Engineers, arXiv:2211.01910, section 3.1.
    """
    prompts = []
    for _ in range(count):
        some = draw.sample(list(workshop.examples), min(SHOWN, len(workshop.examples)))
        pairs = "\n\n".join(f"Input: {example.input}\nOutput: {example.answer}" for example in some)
        prompts.append(
            "I gave a friend an instruction and some inputs. The friend read the instruction and wrote an output for "
            f"every one of the inputs. Here are the input-output pairs:\n\n{pairs}\n\nThe instruction was to"
        )
    return [Candidate(text) for text in _written(_needed(workshop.proposer, "ape"), prompts, workshop.how)]


def paraphrase(workshop: Workshop, parents: Sequence[Candidate], count: int, draw: Random) -> list[Candidate]:
    """Return variations of the parents' instructions; they keep their examples.

    Paper: Zhou et al. 2022, arXiv:2211.01910, section 3.4 (iterative Monte Carlo search).
    """
    chosen = [parent for parent in _in_turn(parents, count) if parent.text]
    prompts = [
        "Generate a variation of the following instruction while keeping the semantic meaning.\n\n"
        f"Input: {parent.text}\nOutput:"
        for parent in chosen
    ]
    return _children(chosen, _written(_needed(workshop.proposer, "paraphrase"), prompts, workshop.how))


def critique(workshop: Workshop, parents: Sequence[Candidate], count: int, draw: Random) -> list[Candidate]:
    """Return the parents' instructions as the proposer mends them, told by the critic why they fail at examples.

    Paper: Pryzant et al. 2023, Automatic Prompt Optimization with "Gradient Descent" (ProTeGi), arXiv:2305.03495,
    section 2.1, with its prompts in short.
    """
    proposer, critic = _needed(workshop.proposer, "critique"), _needed(workshop.critic, "critique")
    given, wanted = workshop.task.words
    chosen, failures = [], []
    for parent in _in_turn(parents, count):
        if worst := workshop.failures(parent):
            chosen.append(parent)
            failures.append(
                f'My current prompt is:\n"{parent.text}"\n\nBut this prompt gets the following examples wrong:\n\n'
                + "\n\n".join(
                    f"{given}: {example.input}\n{wanted}: {example.answer}\nWhat was said: {said}"
                    for example, said in worst
                )
            )
    ask = "\n\nGive a reason why the prompt could have gotten these examples wrong."
    reasons = critic.say([text + ask for text in failures], workshop.how)
    prompts = [
        f"{text}\n\nThe problem with this prompt is: {reason.text.strip()}\n\nBased on this, write a better prompt, "
        "and nothing else. The better prompt is:"
        for text, reason in zip(failures, reasons, strict=True)
    ]
    return _children(chosen, _written(proposer, prompts, workshop.how))


def grips(workshop: Workshop, parents: Sequence[Candidate], count: int, draw: Random) -> list[Candidate]:
    """Return the parents' instructions with a phrase left out, two swapped, or (with a proposer) one said otherwise.

    Phrases are cut at signs and before small words; the paper takes those of a constituency parser.
    Paper: Prasad et al. 2022, GrIPS, arXiv:2203.07281, section 3.
    """
    edits = ("delete", "swap", "paraphrase") if workshop.proposer is not None else ("delete", "swap")
    chosen = [parent for parent in _in_turn(parents, count) if len(phrases(parent.text)) > 1]
    texts, asked = [], []
    for number, parent in enumerate(chosen):
        parts, edit = phrases(parent.text), draw.choice(edits)
        i, j = draw.sample(range(len(parts)), 2)
        if edit == "swap":
            parts[i], parts[j] = parts[j], parts[i]
        elif edit == "delete":
            del parts[i]
        else:
            asked.append((number, i))
        texts.append(parts)
    if asked and workshop.proposer is not None:
        prompts = [f"Say in other words, and write nothing else.\n\nInput: {texts[n][i]}\nOutput:" for n, i in asked]
        for (number, i), text in zip(asked, _written(workshop.proposer, prompts, workshop.how), strict=True):
            texts[number][i] = text or texts[number][i]
    return _children(chosen, [" ".join(parts) for parts in texts])


def shots(workshop: Workshop, parents: Sequence[Candidate], count: int, draw: Random) -> list[Candidate]:
    """Return the parents' instructions with worked examples, drawn with their number and order.

    Instruction and examples are sought together, as one candidate. Paper: Opsahl-Ong et al. 2024, MIPRO,
    arXiv:2406.11695, section 3 (which draws by a surrogate; here it is at random, and selection decides).
    """
    most = min(workshop.shots, len(workshop.examples))
    if most < 1:
        raise UserError("the method shots shows worked examples; raise shots to at least 1")
    examples = list(workshop.examples)
    return [
        Candidate(parent.text, tuple(draw.sample(examples, draw.randint(1, most))), parents=(parent.id,))
        for parent in _in_turn(parents, count)
    ]


def phrases(text: str) -> list[str]:
    """Return the words of a text in phrases: each ends after a sign, or before a small word that begins one."""
    found: list[list[str]] = []
    for word in text.split():
        begins = not found or found[-1][-1][-1] in ",.;:!?" or word.casefold() in _SMALL
        found = [*found, [word]] if begins else [*found[:-1], [*found[-1], word]]
    return [" ".join(words) for words in found]


_SMALL = frozenset(
    "about after and as at because before but by for from if in into nor of on or so than that then through to "
    "until what when where whether which while who with without".split()
)
"""Words that begin a phrase."""


def cleaned(text: str) -> str:
    """Return the instruction in what a model wrote: its first paragraph, without a heading, quotes or a lead-in."""
    text = next((part for part in re.split(r"\n\s*\n", text) if part.strip(_FRAME)), "").strip(_FRAME)
    text = re.sub(r"^(the )?(\w+ )?(instruction|prompt|output)( was| is)?( to\b|\s*:)[\s*]*", "", text, flags=re.I)
    text = " ".join(text.split()).strip(_FRAME)
    return text[:1].upper() + text[1:]


_FRAME = " \n\"'“”*`#:"
"""What stands around an instruction and is no part of it."""


def _written(speaker: Speaker, prompts: Sequence[str], how: How) -> list[str]:
    return [cleaned(said.text) for said in speaker.say(prompts, how)] if prompts else []


def _children(parents: Sequence[Candidate], texts: Sequence[str]) -> list[Candidate]:
    pairs = zip(parents, texts, strict=True)
    return [replace(parent, text=text, parents=(parent.id,)) for parent, text in pairs if text]


def _in_turn(parents: Sequence[Candidate], count: int) -> Iterator[Candidate]:
    return (parents[number % len(parents)] for number in range(count if parents else 0))


def _needed(speaker: Speaker | None, method: str) -> Speaker:
    if speaker is None:
        raise UserError(f"the method {method} needs a model that writes; set proposer.source")
    return speaker


METHODS: dict[str, Method] = {
    "ape": ape,
    "paraphrase": paraphrase,
    "critique": critique,
    "grips": grips,
    "shots": shots,
}
"""Ways to make candidates."""
