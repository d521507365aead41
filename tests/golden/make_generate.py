"""Makes the golden file of greedy decoding: what transformers writes after twenty prompts, each alone, 64 tokens.

COMMAND: python tests/golden/make_generate.py DIRECTORY   (as `kdjax fetch smollm2-135m-instruct` prints it; needs torch
and transformers). Kept are the prompts and the new tokens, beyond the end of a text too, and by how much each chosen
token's logit was at least above the next one's: 20 kB.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

SUBJECTS = (
    "bread",
    "a lighthouse",
    "the number seven",
    "rain",
    "a violin",
    "chess",
    "the moon",
    "soap",
    "maps",
    "salt",
)
FORMS = ("Explain in a few sentences what is special about {}.", "Write the first lines of a story about {}.")
NEW = 64


def make(directory: str) -> None:
    """Write the rows, one for each form and subject."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    rows = []
    for prompt in (form.format(subject) for form in FORMS for subject in SUBJECTS):
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)[0]
            logits = model(whole[None]).logits[0, ids.shape[1] - 1 : -1].double()
        best = logits.topk(2, dim=-1).values
        margin = float((best[:, 0] - best[:, 1]).min())  # how near the nearest tie was
        rows.append(
            {"user": prompt, "prompt": ids[0].tolist(), "new": whole[ids.shape[1] :].tolist(), "margin": margin}
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(__file__).parent / "smollm2" / "greedy.jsonl").write_text(lines)


if __name__ == "__main__":
    make(sys.argv[1])
