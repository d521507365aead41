"""Makes the golden file of the SmolLM2 test: what transformers computes from the fetched model on one paragraph.

COMMAND: python tests/golden/make_smollm2.py DIRECTORY   (as `kdjax fetch smollm2-135m-instruct` prints it; needs torch
and transformers). Logits are kept at 64 spread ids of each row, with the row's log-sum-exp and largest entry: 20 kB.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

TEXT = (
    "The lighthouse keeper had lived alone on the island for eleven years, and in all that time he had never once let "
    "the lamp go out. Every evening, at 17:45, he climbed the 212 steps, trimmed the wick, and wrote the date down."
)


def make(directory: str) -> None:
    """Write tokens, logits at some ids, log-sum-exp and argmax of every row."""
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens).logits[0]
    ids = np.linspace(0, logits.shape[-1] - 1, 64).astype(int)
    np.savez_compressed(
        Path(__file__).parent / "smollm2" / "expected.npz",
        tokens=tokens[0],
        ids=ids,
        logits=logits[:, ids],
        log_sum_exp=logits.double().logsumexp(-1),
        argmax=logits.argmax(-1),
    )


if __name__ == "__main__":
    make(sys.argv[1])
