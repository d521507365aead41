"""Knowledge distilled into weights: SmolLM2-135M-Instruct learns what documents about invented towns say.

COMMAND:  kdjax train configs/knowledge.py
HARDWARE: 2 CPU cores, 6 GB of memory; no GPU
TIME:     about 15 minutes (estimated) once the model (93 MB) is fetched
RESULT:   54 % of questions in wordings never trained on answered without the documents, 0 % before, 76 % with them
          (docs/case-study.md)
PAPER:    Kujanpää et al., arXiv:2412.14964
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.data.invented import facts
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.models.config import Lora
from kdjax.optim import OptimConfig
from kdjax.sampling import AnswersConfig, Sampling

OTHER = [row for row in facts(1) if row["town"] == facts(1)[0]["town"] and row["wording"] == 0]
"""What is asked of a town of another seed: by it the teacher sees how questions are answered."""
EXAMPLE = f"{OTHER[0]['document']}\n" + "".join(
    f"Question: {row['prompt']}\nAnswer: {row['answer']}\n" for row in OTHER
)
QUESTION = "Question: {{ prompt }}\nAnswer:"


def get_config() -> Config:
    return Config(
        name="knowledge",
        teacher=ModelSpec(source="smollm2-135m-instruct"),
        student=ModelSpec(source="teacher", lora=Lora(rank=16)),
        data=DataConfig(
            sources=("invented",),
            student_view=QUESTION,
            teacher_view=EXAMPLE + "\n{{ document }}\n" + QUESTION,
            packing="first_fit",
            sequence_length=128,
            teacher_length=512,
            group_field="id",
            eval_fraction=0.25,
            dedupe_ngram=0,
        ),
        answers=AnswersConfig(by="teacher", tokens=12, stop=("\n",), sampling=Sampling(temperature=0.7, top_p=0.95)),
        objective=ObjectiveConfig(alpha=0.0, temperature=1.0, chunk_tokens=256),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=10, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=50, keep=1, keep_best=False),
        steps=100,
        batch_size=4,
        eval_every=50,
    )
