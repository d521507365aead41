"""TRL: `GKDTrainer` as it trains, off-policy, forward KL, without recomputing activations."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from benchmarks.engines import gate
from benchmarks.engines.torch_loop import models


def main() -> None:
    """Take steps as long as they are asked for."""
    from benchmarks.loss_peers import torch_on_all_cores

    torch = torch_on_all_cores()
    door, asked = gate.Gate("trl", "torch", "transformers", "accelerate"), gate.problem()
    transformers, gkd = import_module("transformers"), import_module("trl.experimental.gkd")
    tokenizers, datasets = import_module("tokenizers"), import_module("datasets")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, "<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    rows, half = asked.batches_NBT.shape[1], asked.dtype == "bfloat16"
    arguments = gkd.GKDConfig(
        output_dir=str(asked.home / "trl"),
        per_device_train_batch_size=rows,
        max_steps=10**6,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=asked.b2,
        max_grad_norm=1e9,
        lmbda=0.0,
        beta=0.0,
        bf16=half,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    batches = asked.batches()

    def collate(_: Any) -> dict[str, Any]:
        tokens_BT = torch.tensor(next(batches), dtype=torch.long)
        labels_BT = tokens_BT.clone()
        labels_BT[:, 0] = -100  # it has no token before it that could say it
        batch = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "labels": labels_BT}
        return batch | {"prompts": tokens_BT[:, :1], "prompt_attention_mask": torch.ones_like(tokens_BT[:, :1])}

    facts: dict[str, Any] = {}

    class Turns(transformers.TrainerCallback):
        """Takes a step only when it is asked for."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            door.turn(**facts, **gate.cuda_peak(torch))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            facts.update(loss=logs["loss"], grad_norm=logs["grad_norm"]) if "grad_norm" in logs else None

    teacher, student = models(asked, "cpu")
    trainer = gkd.GKDTrainer(
        student,
        teacher,
        arguments,
        data_collator=collate,
        train_dataset=datasets.Dataset.from_dict({"messages": [""] * rows}),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    door.save = student.save_pretrained
    trainer.train()


if __name__ == "__main__":
    main()
