"""A prompt found, distilled and evaluated: what kind of thing a piece of Python's documentation is about.

COMMAND:  kdjax pipeline configs/prompt_pipeline.py
HARDWARE: 2 CPU cores, 4 GB of memory; no GPU
TIME:     about 15 minutes (estimated) once the model (93 MB) is fetched
RESULT:   accuracy on unseen texts with the prompt, without it, and distilled into weights, each with its interval
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.models.config import Lora
from kdjax.optim import OptimConfig
from kdjax.pipeline import PipelineConfig
from kdjax.prompts.config import PromptsConfig, SpeakerConfig
from kdjax.sampling import AnswersConfig, Sampling

MODEL = "smollm2-135m-instruct"
KINDS = ("topic", "module", "class", "function")


def get_config() -> PipelineConfig:
    search = PromptsConfig(
        task="classification",
        sources=("python_docs",),
        input="{{ text[:120] }}",
        answer=f"{{{{ {list(KINDS)}[label] }}}}",
        labels=KINDS,
        instructions=(
            "Say what this piece of Python's documentation is about.",
            "Is the text about a topic of the language, or the docstring of a module, a class or a function?",
            "Classify the documentation as topic, module, class or function.",
        ),
        methods=("paraphrase", "grips", "shots"),
        rounds=2,
        children=3,
        shots=4,
        budget=400,
        propose_rows=40,
        select_rows=80,
        test_rows=200,
        few_shot_baseline=0,
        proposal_tokens=40,
        scorer=SpeakerConfig(MODEL),
        proposer=SpeakerConfig(MODEL),
    )
    distil = Config(
        name="prompt_pipeline",
        teacher=ModelSpec(source=MODEL),
        student=ModelSpec(source="teacher", lora=Lora(rank=16)),
        data=DataConfig(
            packing="first_fit",
            sequence_length=128,
            eval_fraction=0.08,
            eval_tokens=8_192,
            max_bad_rows=50,  # texts of letters that are many tokens do not fit
        ),
        answers=AnswersConfig(by="teacher", count=400, tokens=8, sampling=Sampling(temperature=1.0)),
        objective=ObjectiveConfig(alpha=0.0, temperature=1.0, chunk_tokens=256),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=25, keep=1, keep_best=False),
        steps=60,
        batch_size=4,
    )
    return PipelineConfig(name="prompt_pipeline", search=search, distil=distil)
