"""A plain PyTorch loop over transformers' models, and what else `benchmarks.loss` knows of losses in the place of its.

`python -m benchmarks.engines.torch_loop DIR [LOSS]`: a row of `benchmarks.loss_peers.PEERS`. At bfloat16 the student's
weights stay float32 under autocast, and the teacher's are bfloat16.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from benchmarks.engines import gate


def models(asked: gate.Problem, device: str) -> tuple[Any, Any]:
    """Return teacher and student on a device."""
    torch, transformers = import_module("torch"), import_module("transformers")

    def load(name: str, dtype: str) -> Any:
        of = transformers.AutoModelForCausalLM.from_pretrained
        return of(asked.home / name, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device)

    return load("teacher", asked.dtype).eval().requires_grad_(False), load("student", "float32").train()


def main() -> None:
    """Take steps as long as they are asked for."""
    name = sys.argv[2] if len(sys.argv) > 2 else "torch plain"
    from benchmarks.loss_peers import PEERS, torch_on_all_cores

    torch = torch_on_all_cores()
    door = gate.Gate("torch", "transformers", *{"TRL": ["trl"], "Liger": ["liger-kernel"]}.get(name.split()[0], []))
    asked = gate.problem()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, student = models(asked, device)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=asked.learning_rate, betas=(0.9, asked.b2), eps=1e-8, weight_decay=0.0, foreach=True
    )
    loss_of = PEERS[name].make(0.0, 0.0)
    batches = (torch.tensor(tokens_BT, dtype=torch.long, device=device) for tokens_BT in asked.batches())
    half = {"device_type": device, "dtype": torch.bfloat16, "enabled": asked.dtype == "bfloat16"}

    def hidden_ND(model: Any, tokens_BT: Any) -> Any:
        hidden_BTD = model.model(tokens_BT).last_hidden_state[:, :-1]
        return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])

    def step() -> tuple[float, float]:
        tokens_BT = next(batches)
        with torch.autocast(**half):
            with torch.no_grad():
                teacher_ND = hidden_ND(teacher, tokens_BT)
            heads = [each.get_output_embeddings().weight for each in (student, teacher)]
            student_ND = hidden_ND(student, tokens_BT)
            loss = loss_of(student_ND, heads[0], teacher_ND, heads[1], tokens_BT[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss), float(norm)  # waits for the device

    door.save = student.save_pretrained
    door.turn()
    while True:
        loss, norm = step()
        door.turn(loss=loss, grad_norm=norm, **gate.cuda_peak(torch))


if __name__ == "__main__":
    main()
