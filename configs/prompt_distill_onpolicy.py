"""A prompt distilled on the student's own answers: half of the batches it answers itself, by reverse KL.

COMMAND:  kdjax train configs/prompt_distill_onpolicy.py
HARDWARE: 2 CPU cores, 6 GB of memory; no GPU
TIME:     about 30 minutes of one core, answers and measuring included, once the model (93 MB) is fetched;
          --prompt-file my.txt distils one's own
RESULT:   91 % of the prompt's effect on unseen questions is recovered, on its own answers too (one seed:
          docs/prompts.md)
PAPER:    OPCD, arXiv:2602.12275; the mix is GKD's, arXiv:2306.13649
"""

import runpy
from dataclasses import replace
from pathlib import Path

from kdjax.config import Config


def get_config() -> Config:
    off_policy = runpy.run_path(str(Path(__file__).with_name("prompt_distill.py")))["get_config"]()
    return replace(
        off_policy,
        name="prompt_distill_onpolicy",
        answers=replace(off_policy.answers, student_share=0.5),
        objective=replace(off_policy.objective, divergence="reverse_kl"),
    )
