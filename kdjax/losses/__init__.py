"""The objective, its divergences, and the fused loss over hidden states and heads."""

from kdjax.losses.divergences import DIVERGENCES, Divergence
from kdjax.losses.fused import fused_kd_loss, head_logits
from kdjax.losses.objective import ObjectiveConfig

__all__ = ["DIVERGENCES", "Divergence", "ObjectiveConfig", "fused_kd_loss", "head_logits"]
