"""A prompt found, distilled and evaluated: what kind of thing a name of Python's library is.

COMMAND:  kdjax pipeline configs/prompt_pipeline.py
HARDWARE: 2 CPU cores, 4 GB of memory; no GPU
TIME:     about 18 minutes of one core once the model (93 MB) is fetched
RESULT:   accuracy on unseen names 0.54 with the prompt, 0.41 without it, 0.58 distilled into weights; 0.33 is chance
          (intervals: docs/search.md)
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
KINDS = ("module", "class", "function")


def get_config() -> PipelineConfig:
    search = PromptsConfig(
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
        methods=("paraphrase", "grips", "shots"),
        rounds=2,
        children=3,
        shots=8,
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
            eval_fraction=0.1,
            eval_tokens=8_192,
        ),
        answers=AnswersConfig(by="teacher", count=400, tokens=8, stop=("\n",), sampling=Sampling(temperature=1.0)),
        objective=ObjectiveConfig(alpha=0.0, temperature=1.0, chunk_tokens=256),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=25, keep=1, keep_best=False),
        steps=60,
        batch_size=4,
    )
    return PipelineConfig(name="prompt_pipeline", search=search, distil=distil)
