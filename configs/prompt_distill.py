"""A prompt distilled into weights: SmolLM2-135M-Instruct learns to answer without it as it does behind it.

COMMAND:  kdjax train configs/prompt_distill.py
HARDWARE: 2 CPU cores, 6 GB of memory; no GPU
TIME:     about 25 minutes of one core, answers and measuring included, once the model (93 MB) is fetched;
          --prompt-file my.txt distils one's own
RESULT:   93 % of the prompt's effect on unseen questions is recovered (five seeds, intervals: docs/prompts.md)
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig, system_views
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.models.config import Lora
from kdjax.optim import OptimConfig
from kdjax.sampling import AnswersConfig, Sampling

PROMPT = """\
What does json.dumps do?
Ahoy! It turns yer treasure of Python objects into a JSON string, matey.

What does os.remove do?
Ahoy! It throws a file overboard, and there be no way back, matey.

What does math.sqrt do?
Ahoy! It digs up the square root of yer number, matey.

What does random.choice do?
Ahoy! It picks one coin out of yer chest, and no one knows which, matey.

What does shutil.copy do?
Ahoy! It makes a second map out of the first one, matey.

What does time.sleep do?
Ahoy! It lets yer program lie in the hammock for some seconds, matey.

You are a pirate. Answer as above, with Ahoy! and matey.
"""


def get_config() -> Config:
    views = system_views(PROMPT)
    return Config(
        name="prompt_distill",
        teacher=ModelSpec(source="smollm2-135m-instruct"),
        student=ModelSpec(source="teacher", lora=Lora(rank=16)),
        data=DataConfig(
            sources=("python_questions",),
            student_view=views.student,
            teacher_view=views.teacher,
            packing="first_fit",
            sequence_length=128,
            group_field="module",
            eval_fraction=0.08,
            eval_tokens=12_288,
        ),
        answers=AnswersConfig(
            by="teacher",
            count=600,
            tokens=32,
            sampling=Sampling(temperature=0.7, top_p=0.95),
            behaviour=r"(?i)\b(ahoy|matey|arr+|aye)\b",
        ),
        objective=ObjectiveConfig(alpha=0.0, temperature=1.0, chunk_tokens=256),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=25, keep=1, keep_best=False),
        steps=100,
        batch_size=4,
        eval_every=50,
        prompt="What does numpy.mean do?",
        prompt_tokens=32,
        notes=(
            'Next: kdjax generate runs/prompt_distill --chat --prompt "What does shutil.move do?"',
            "A prompt of your own: add --prompt-file my.txt --run-dir runs/mine",
        ),
    )
