"""The prompt by which a small chat model finds best which word of a docstring's first lines is the function's name.

COMMAND:  kdjax prompts configs/prompt_question_answering.py
HARDWARE: 2 CPU cores, 3 GB of memory; no GPU
TIME:     at most 20 minutes; not timed alone
RESULT:   token F1 of 0.106 (0.071 to 0.146) on unseen examples, 0.025 of a candidate at random: four times as good, and
          still a poor answer; the winner is a broken text of the small proposer (docs/search.md)
"""

from kdjax.prompts.config import PromptsConfig, SpeakerConfig


def get_config() -> PromptsConfig:
    return PromptsConfig(
        name="prompt_question_answering",
        task="question_answering",
        sources=("python_questions",),
        # The last part of the name is the answer where the description has it as a word; other rows are left out.
        input="Which function of the module {{ module }} is described so: {{ answer[:100] }}",
        answer='{% set name = id.split(".")[-1] %}{{ name if name in answer[:100].split() }}',
        instructions=(
            "Answer with the name of the function, one word of the description.",
            "What is the function called?",
            "Answer the question in one word.",
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
        max_new_tokens=8,
        few_shot_baseline=2,
        proposal_tokens=24,
        scorer=SpeakerConfig("smollm2-135m-instruct"),
        proposer=SpeakerConfig("smollm2-135m-instruct"),
    )
