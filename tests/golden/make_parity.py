"""Makes the golden files of the parity tests: tiny random models of transformers, their logits and greedy text.

COMMAND: PYTHONPATH=. python tests/golden/make_parity.py [NAME ...]

It needs torch and transformers, and rewrites the directories beside it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.models import PIECES, their_logits

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
LLAMA_3_ROPE = {
    "rope_theta": 1e3,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
MOE = LLAMA | {"num_experts_per_tok": 2, "output_router_logits": False}
NEOX = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
GEMMA = LLAMA | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5, "attention_bias": False}
BERT = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
ROBERTA = BERT | {"pad_token_id": 0, "layer_norm_eps": 1e-5}
MODERNBERT = (
    BERT
    | {"local_attention": 6, "pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}
    | {
        "initializer_range": 0.3,
        "initializer_cutoff_factor": 3.0,
    }
)
DISTILBERT = {"vocab_size": 128, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48} | {
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
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
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3} | {
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}


def untied(model):
    """Return a T5 with a head of its own, as those of version 1.1 have; transformers 5 makes only tied ones."""
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.shared.weight))
    return model


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
    "llama_3": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **LLAMA, head_dim=16, tie_word_embeddings=True, rope_parameters={"rope_type": "llama3"} | LLAMA_3_ROPE
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True, rope_parameters={"rope_type": "yarn"} | YARN)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=False)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=5)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**MOE, head_dim=16, num_experts=5, moe_intermediate_size=24, norm_topk_prob=False)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **LLAMA, pad_token_id=0, sliding_window=7, rope_parameters={"rope_theta": 1e3, "partial_rotary_factor": 0.5}
        )
    ),
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(**LLAMA, pad_token_id=0, no_rope_layer_interval=2)
    ),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**LLAMA, pad_token_id=0)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**NEOX, rope_parameters={"rope_theta": 1e3, "partial_rotary_factor": 0.5})
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **GEMMA,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "bert_classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**BERT, num_labels=3)
    ),
    "bert_model": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ROBERTA)),
    "roberta_classifier": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ROBERTA)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**DISTILBERT)),
    "distilbert_classifier": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**DISTILBERT)
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**MODERNBERT)),
    "modernbert_classifier": lambda: transformers.ModernBertForSequenceClassification(
        transformers.ModernBertConfig(**MODERNBERT, norm_bias=True, mlp_bias=True, classifier_bias=True, num_labels=3)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5_gated": lambda: untied(
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
}


def make(name):
    """Write one model's directory, with its logits for two rows and pieces of them, and the greedy text it adds."""
    torch.manual_seed(len(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key.lower() or "ln_" in key or key.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        tokens = torch.randint(1, 128, (2, 12))
        expected = {"tokens": tokens, "logits": their_logits(model, tokens)}
        for number, (text, length, _, _) in enumerate(PIECES):
            expected[f"piece_{number}"] = their_logits(model, tokens[text : text + 1, :length])
        if model.can_generate():
            ends = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            greedy = model.generate(tokens[:1], max_new_tokens=10, **ends)[0]
            expected["greedy"] = greedy[-10:]
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    (HERE / name / "model.safetensors").chmod(0o644)
    np.savez_compressed(HERE / name / "expected.npz", **expected)


if __name__ == "__main__":
    for model_name in sys.argv[1:] or MODELS:
        make(model_name)
