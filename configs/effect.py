"""What a prompt does to a small chat model that tells what kind of thing a name of Python's library is.

COMMAND:  kdjax effect configs/effect.py
HARDWARE: 2 CPU cores, 3 GB of memory; no GPU
TIME:     about 6 minutes of one core once the model (93 MB) is fetched
RESULT:   no prompt of a person is clearly better than none; the words of the labels move the score by 17 points, the
          format by 12 (docs/effect.md)
"""

from kdjax.prompts.config import EffectConfig, PromptsConfig, SpeakerConfig

KINDS = ("module", "class", "function")


def get_config() -> EffectConfig:
    prompts = PromptsConfig(
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
        shots=3,
        propose_rows=40,
        select_rows=3,
        test_rows=60,
        scorer=SpeakerConfig("smollm2-135m-instruct"),
    )
    return EffectConfig(
        prompts=prompts,
        name="effect",
        orders=3,
        draws=2,
        most_shots=8,
        label_sets=("package, type, routine",),
        distil_seconds=1080.0,  # what configs/prompt_pipeline.py says that it takes
    )
