"""Soft prompts in PEFT's own directories, and the logits that PEFT computes with them; needs torch and peft.

COMMAND: python tests/golden/make_peft.py
"""

from pathlib import Path

import numpy as np
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parent
KINDS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 9)).astype(np.int32)


def main() -> None:
    """Write a directory for each base and kind."""
    for base in ("llama_3", "gpt2"):
        for kind, config in KINDS.items():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(GOLDEN / base, attn_implementation="eager")
            model = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
            out = GOLDEN / "peft" / f"{base}_{kind}"
            model.save_pretrained(str(out))
            (out / "README.md").unlink()
            named = (out / "adapter_config.json").read_text().replace(str(GOLDEN), "tests/golden")
            (out / "adapter_config.json").write_text(named)
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(TOKENS).long(), attention_mask=torch.ones(2, 9)).logits
            np.savez(out / "expected.npz", tokens=TOKENS, logits=logits[:, -9:].numpy())


if __name__ == "__main__":
    main()
