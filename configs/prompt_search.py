"""The prompt by which a small chat model tells best what kind of thing a name of Python's library is.

COMMAND:  kdjax prompts configs/prompt_search.py
HARDWARE: 2 CPU cores, 3 GB of memory; no GPU
TIME:     about 9 minutes of one core once the model (93 MB) is fetched
RESULT:   accuracy 0.49 by the prompt that is found, 0.39 by a candidate at random, 0.47 by worked examples selected
          alone, 0.33 by chance (intervals: docs/search.md)
"""

from kdjax.prompts.config import PromptsConfig, SpeakerConfig

KINDS = ("module", "class", "function")


def get_config() -> PromptsConfig:
    return PromptsConfig(
        name="prompt_search",
        task="classification",
        sources=("python_docs",),
        input="{{ id.split('.')[-1] }}",
        answer=f"{{{{ {['', *KINDS]}[label] }}}}",
        labels=KINDS,
        balanced=True,
        instructions=(
            "Is this the name of a module, a class or a function in Python?",
            "Say what this name in Python's standard library is.",
            "Classify the Python name as module, class or function.",
        ),
        methods=("ape", "paraphrase", "grips", "shots"),
        rounds=2,
        beam=3,
        children=3,
        shots=8,
        budget=1200,
        propose_rows=40,
        select_rows=150,
        test_rows=150,
        few_shot_baseline=8,
        proposal_tokens=40,
        scorer=SpeakerConfig("smollm2-135m-instruct"),
        proposer=SpeakerConfig("smollm2-135m-instruct"),
    )
