"""Losses of language models from hidden states: the head's logits are never all in memory."""

from .ops.linear_logp import linear_logp

__all__ = ["linear_logp"]
