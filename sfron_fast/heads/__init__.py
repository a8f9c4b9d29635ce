"""Losses of language models from hidden states: the head's logits are never all in memory."""

from ..ops.linear_adaptive_cross_entropy import LinearLoss, linear_adaptive_cross_entropy
from ..ops.linear_logp import linear_logp
from ..ops.linear_logp_stats import LogpStats, linear_logp_stats
from ..ops.linear_soft_target_kl import linear_soft_target_kl

__all__ = [
    "LinearLoss",
    "LogpStats",
    "linear_adaptive_cross_entropy",
    "linear_logp",
    "linear_logp_stats",
    "linear_soft_target_kl",
]
