"""Losses of language models from hidden states: the head's logits are never all in memory."""

from .ops.linear_logp import linear_logp
from .ops.linear_logp_stats import LogpStats, linear_logp_stats

__all__ = ["LogpStats", "linear_logp", "linear_logp_stats"]
