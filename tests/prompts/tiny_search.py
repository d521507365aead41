"""A search so small that a test can afford it: a tiny model, and labels that one of the instructions gives exactly."""

import json

import tiny_speaker

from kdjax.prompts.config import PromptsConfig, SpeakerConfig
from kdjax.prompts.tasks import TASKS, Candidate, show

LABELS = tuple("abcdefgh")
PLANTED = "Say which one it is, please, and nothing more."
OTHERS = tuple(f"{word} the {thing}." for word in ("Name", "Tell", "Give") for thing in ("letter", "kind"))


def write(directory, rows=120):
    """Write a model, and rows whose labels are what it answers to the planted instruction; return the config."""
    tiny_speaker.write(directory / "model")
    tiny, planted = tiny_speaker.speaker(1, chat=False), Candidate(PLANTED)
    texts = [f"{n * 7919 % 1000} {'xyz'[n % 3]}" for n in range(rows)]
    pairs = [(show(TASKS["classification"], planted, text), label) for text in texts for label in LABELS]
    log_probs = [weighed.log_prob for weighed in tiny.weigh(pairs)]
    of_text = (log_probs[first : first + len(LABELS)] for first in range(0, len(pairs), len(LABELS)))
    answers = [LABELS[max(range(len(LABELS)), key=some.__getitem__)] for some in of_text]
    lines = [json.dumps({"text": text, "kind": answer}) for text, answer in zip(texts, answers, strict=True)]
    (directory / "rows.jsonl").write_text("\n".join(lines))
    return PromptsConfig(
        task="classification",
        sources=(f"jsonl:{directory / 'rows.jsonl'}",),
        input="{{ text }}",
        answer="{{ kind }}",
        labels=LABELS,
        calibrated=False,
        instructions=(*OTHERS, PLANTED),
        methods=("grips",),
        rounds=2,
        children=3,
        budget=200,
        propose_rows=12,
        select_rows=30,
        test_rows=40,
        few_shot_baseline=1,
        scorer=SpeakerConfig(str(directory / "model"), chat=False),
    )
