"""The objective, its divergences, and the fused loss over hidden states and heads."""

from kdjax.losses.across import chunk_divergence
from kdjax.losses.chunk import LOGGED, TOKEN_WEIGHTS
from kdjax.losses.divergences import DIVERGENCES, ESTIMATORS, Chosen, Divergence, choose
from kdjax.losses.features import FEATURES, Feature
from kdjax.losses.fused import IMPLEMENTATIONS, Shard, fused_kd_loss, one_device
from kdjax.losses.likelihoods import log_likelihoods, said_log_probs, target_log_probs
from kdjax.losses.logits import head_logits
from kdjax.losses.objective import ObjectiveConfig, Term
from kdjax.losses.policy import sample_weights, to_go
from kdjax.losses.sparse import of_head, sample, top_k

__all__ = [
    "DIVERGENCES",
    "ESTIMATORS",
    "FEATURES",
    "IMPLEMENTATIONS",
    "LOGGED",
    "TOKEN_WEIGHTS",
    "Chosen",
    "Divergence",
    "Feature",
    "ObjectiveConfig",
    "Shard",
    "Term",
    "choose",
    "chunk_divergence",
    "fused_kd_loss",
    "head_logits",
    "log_likelihoods",
    "of_head",
    "one_device",
    "said_log_probs",
    "sample",
    "sample_weights",
    "target_log_probs",
    "to_go",
    "top_k",
]
