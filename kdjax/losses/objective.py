"""What is minimised: L = α·L_CE + (1 − α)·f(T)·D(teacher, student) at temperature T."""

from __future__ import annotations

from dataclasses import dataclass

from kdjax.errors import UserError, did_you_mean
from kdjax.losses.divergences import DIVERGENCES


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective's parts and weights. Without a teacher only the cross entropy remains."""

    alpha: float = 0.1
    """Weight of the cross entropy to the data; 1 − alpha is that of the divergence to the teacher. With 1 the teacher
    is not run in training and only measures."""
    temperature: float = 1.0
    """Softens both distributions; the divergence is multiplied by its own factor (T² for the KLs)."""
    divergence: str = "forward_kl"
    """A row of kdjax.losses.DIVERGENCES."""
    chunk_tokens: int = 256
    """Tokens whose logits exist at one time: memory against the size of matmuls."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"objective.alpha is {self.alpha}; wanted a weight from 0 to 1")
        if not self.temperature > 0:
            raise UserError(f"objective.temperature is {self.temperature}; wanted a number above 0")
        if self.chunk_tokens < 1:
            raise UserError(f"objective.chunk_tokens is {self.chunk_tokens}; wanted at least 1")
        if self.divergence not in DIVERGENCES:
            raise UserError(
                f"objective.divergence {self.divergence!r} is unknown{did_you_mean(self.divergence, DIVERGENCES)}"
            )
