"""The prompt by which a small chat model tells best what a piece of Python's documentation is about.

COMMAND:  kdjax prompts configs/prompt_search.py
HARDWARE: 2 CPU cores, 3 GB of memory; no GPU
TIME:     about 15 minutes of one core once the model (93 MB) is fetched
RESULT:   a prompt clearly better than a candidate at random, and as good as worked examples selected alone (figures:
          docs/search.md)
"""

from kdjax.prompts.config import PromptsConfig, SpeakerConfig

KINDS = ("module", "class", "function")


def get_config() -> PromptsConfig:
    return PromptsConfig(
        name="prompt_search",
        task="classification",
        sources=("python_docs",),
        input="{{ text[:160] }}",
        answer=f"{{{{ {['', *KINDS]}[label] }}}}",
        labels=KINDS,
        balanced=True,
        instructions=(
            "Say what this piece of Python's documentation is about.",
            "Is the text the docstring of a module, a class or a function?",
            "Classify the documentation as module, class or function.",
        ),
        methods=("ape", "paraphrase", "grips", "shots"),
        rounds=2,
        beam=3,
        children=3,
        shots=2,
        budget=640,
        propose_rows=40,
        select_rows=100,
        test_rows=120,
        few_shot_baseline=2,
        proposal_tokens=40,
        scorer=SpeakerConfig("smollm2-135m-instruct"),
        proposer=SpeakerConfig("smollm2-135m-instruct"),
    )
