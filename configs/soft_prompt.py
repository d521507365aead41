"""A prompt compressed: 16 vectors before each question do to SmolLM2-135M-Instruct what a prompt of 198 tokens does.

COMMAND:  kdjax train configs/soft_prompt.py
HARDWARE: 2 CPU cores, 6 GB of memory; no GPU
TIME:     about 7 minutes once the model (93 MB) is fetched
RESULT:   82 % (79 to 85) of the prompt's effect on unseen questions is recovered (docs/case-study.md)
"""

from kdjax.checkpoint import CheckpointConfig
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.models.config import SoftPrompt
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

You are a pirate. Answer as above, with Ahoy! and matey."""

SYSTEM = f"<|im_start|>system\n{PROMPT}<|im_end|>\n"
QUESTION = "<|im_start|>user\n{{ prompt }}<|im_end|>\n<|im_start|>assistant\n"


def get_config() -> Config:
    return Config(
        name="soft_prompt",
        teacher=ModelSpec(source="smollm2-135m-instruct"),
        student=ModelSpec(
            source="teacher", soft_prompt=SoftPrompt(tokens=16, kind="prompt", start="prompt", text=SYSTEM)
        ),
        data=DataConfig(
            sources=("python_questions",),
            student_view=QUESTION,
            teacher_view=SYSTEM + QUESTION,
            packing="first_fit",
            sequence_length=128,
            group_field="module",
            eval_fraction=0.08,
            eval_tokens=4096,
        ),
        answers=AnswersConfig(
            by="teacher",
            count=500,
            tokens=32,
            sampling=Sampling(temperature=0.7, top_p=0.95),
            behaviour=r"(?i)\b(ahoy|matey|arr+|aye)\b",
        ),
        objective=ObjectiveConfig(alpha=0.0, temperature=1.0, chunk_tokens=256),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=10, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=20, keep=1, keep_best=False),
        steps=40,
        batch_size=4,
        eval_every=20,
        prompt="What does numpy.mean do?",
        prompt_tokens=32,
        notes=(
            'Next: kdjax generate runs/soft_prompt --chat --prompt "What does shutil.move do?"',
            "For PEFT: kdjax export runs/soft_prompt OUT_DIR",
        ),
    )
