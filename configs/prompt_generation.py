"""The prompt by which a small chat model writes best the beginning of a docstring from the function's name alone.

COMMAND:  kdjax prompts configs/prompt_generation.py
HARDWARE: 2 CPU cores, 3 GB of memory; no GPU
TIME:     about 7 minutes of one core once the model (93 MB) is fetched
RESULT:   the winner's ROUGE-L is 0.163, that of a candidate at random 0.121, and the intervals of the gain are above 0
          (docs/search.md)
"""

from kdjax.prompts.config import PromptsConfig, SpeakerConfig


def get_config() -> PromptsConfig:
    return PromptsConfig(
        name="prompt_generation",
        task="generation",
        sources=("python_questions",),
        input="{{ id }}",
        answer="{{ answer }}",
        instructions=(
            "Write the first line of the docstring of this function of Python's standard library.",
            "Say in one line what this function does.",
            "Write the documentation of the function.",
        ),
        methods=("ape", "paraphrase", "grips", "shots"),
        rounds=2,
        beam=2,
        children=2,
        shots=2,
        budget=160,
        propose_rows=30,
        select_rows=50,
        test_rows=60,
        max_new_tokens=20,
        few_shot_baseline=2,
        proposal_tokens=24,
        scorer=SpeakerConfig("smollm2-135m-instruct"),
        proposer=SpeakerConfig("smollm2-135m-instruct"),
    )
