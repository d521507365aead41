"""The objective, its divergences, and the fused loss over hidden states and heads."""

from kdjax.losses.chunk import LOGGED, TOKEN_WEIGHTS
from kdjax.losses.divergences import DIVERGENCES, ESTIMATORS, Chosen, Divergence, choose
from kdjax.losses.features import FEATURES, Feature
from kdjax.losses.fused import IMPLEMENTATIONS, Shard, fused_kd_loss, log_ratios, one_device
from kdjax.losses.logits import head_logits
from kdjax.losses.objective import ObjectiveConfig, Term
from kdjax.losses.policy import TO_GO, to_go
from kdjax.losses.sparse import of_head, sample, top_k

__all__ = [
    "DIVERGENCES",
    "ESTIMATORS",
    "FEATURES",
    "IMPLEMENTATIONS",
    "LOGGED",
    "TOKEN_WEIGHTS",
    "TO_GO",
    "Chosen",
    "Divergence",
    "Feature",
    "ObjectiveConfig",
    "Shard",
    "Term",
    "choose",
    "fused_kd_loss",
    "head_logits",
    "log_ratios",
    "of_head",
    "one_device",
    "sample",
    "to_go",
    "top_k",
]
