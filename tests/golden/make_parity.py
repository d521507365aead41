"""Makes the golden files of the parity tests: tiny random models of transformers, their logits and greedy text.

COMMAND: python tests/golden/make_parity.py   (needs torch and transformers; rewrites the directories beside it)
"""

from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {
    "llama_tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama_untied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **LLAMA,
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
            head_dim=12,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
}


def make(name):
    """Write one model's directory, with its logits for two rows and the greedy text after the first of them."""
    torch.manual_seed(len(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key or key.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = torch.randint(1, 128, (2, 12))
        logits = model(tokens).logits
        greedy = model.generate(tokens[:1], max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink()
    (HERE / name / "model.safetensors").chmod(0o644)
    np.savez_compressed(HERE / name / "expected.npz", tokens=tokens, logits=logits, greedy=greedy[0, 12:])


if __name__ == "__main__":
    for model_name in MODELS:
        make(model_name)
