"""The prompt by which a small chat model writes best the first line of a docstring from the rest of it.

COMMAND:  kdjax prompts configs/prompt_summarising.py
HARDWARE: 2 CPU cores, 3 GB of memory; no GPU
TIME:     about 6 minutes of one core once the model (93 MB) is fetched
RESULT:   the winner's ROUGE-L is 0.125, that of a candidate at random 0.103, which may be chance (docs/search.md)
"""

from kdjax.prompts.config import PromptsConfig, SpeakerConfig


def get_config() -> PromptsConfig:
    return PromptsConfig(
        name="prompt_summarising",
        task="summarising",
        sources=("python_docs",),
        # Docstrings (label 0 is a topic of the manual) of one line, a blank line and a body; other rows are left out.
        input='{{ " ".join(text.partition("\\n\\n")[2][:240].split()) if label }}',
        answer='{% set line = text.partition("\\n\\n")[0] %}{{ line if "\\n" not in line }}',
        instructions=(
            "Summarise the text in one line.",
            "Write the first line of the docstring that goes on with this text.",
            "Say in a few words what this does.",
        ),
        methods=("ape", "paraphrase", "grips", "shots"),
        rounds=2,
        beam=2,
        children=2,
        shots=1,
        budget=120,
        propose_rows=30,
        select_rows=40,
        test_rows=50,
        max_new_tokens=20,
        few_shot_baseline=1,
        proposal_tokens=24,
        scorer=SpeakerConfig("smollm2-135m-instruct"),
        proposer=SpeakerConfig("smollm2-135m-instruct"),
    )
