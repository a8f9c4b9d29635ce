"""What evaluations ask of a language model's head about each token, without all its logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import linear_rows, registry
from .dtypes import accumulate_dtype
from .linear_arguments import check, given
from .linear_tiles import Head, LogSums, Tile, counted_rows, logit_tiles, multiplied, spread, taken


class LogpStats(NamedTuple):
    """Of each row, 0 where the label is ignored; p = softmax(logits)."""

    logp: Tensor  # log p(label)
    correct: Tensor  # bool: the label is the first of the likeliest classes
    entropy: Tensor  # -sum p log p
    variance: Tensor  # of log p under p


def formula(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> LogpStats:
    """All logits at once: the truth."""
    counted = labels != ignore_index
    hidden = torch.where(counted.unsqueeze(1), hidden, 0.0)
    logits = Head(weight, bias, softcap, logit_scale).logits(hidden)
    found = of_logits(logits, torch.where(counted, labels, 0))
    return LogpStats(*(torch.where(counted, t, torch.zeros_like(t)) for t in found))


def of_logits(logits: Tensor, labels: Tensor) -> LogpStats:
    """Of logits [rows, classes] that are there already, and labels [rows] none of which is ignored.

    A logit may be -inf: a class that is switched off.
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(1)
    apart = log_p + entropy.unsqueeze(1)
    variance = torch.where(p == 0, 0.0, p * apart.square()).sum(1)
    picked = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    return LogpStats(picked, log_p.argmax(1) == labels, entropy, variance)


class Moments(LogSums):
    """Also sums of e^(x - shift) (x - shift)^n, n = 1, 2, without the label; and the argmax."""

    def __init__(self, labels: Tensor, like: Tensor) -> None:
        super().__init__(labels, like)
        self.first, self.second = torch.zeros_like(self.others), torch.zeros_like(self.others)
        self.argmax = torch.zeros_like(labels)

    def add(self, tile: Tile) -> None:
        """The tile's values may be overwritten."""
        add = linear_rows.serving("linear_moments_", tile.values)
        sums = (self.maximum, self.others, self.picked, self.first, self.second, self.argmax)
        add(tile.values, self.labels, tile.start, *sums)

    def stats(self) -> LogpStats:
        """Each [rows]."""
        logp, shift, log_sum = self.result()
        label = (self.picked - shift).clamp_min(linear_rows.LEAST)
        power = label.exp()
        total = self.others + power
        mean = (self.first + power * label) / total
        square = (self.second + power * label.square()) / total
        variance = (square - mean.square()).clamp_min(0.0)
        return LogpStats(logp, self.argmax == self.labels, log_sum - mean, variance)


def stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> LogpStats:
    """As ``formula``, tile by tile."""
    rows, head = counted_rows(labels, ignore_index), Head(weight, bias, softcap, logit_scale)
    hidden, counted = taken(rows, hidden, labels)
    moments = Moments(counted, hidden)
    for tile in logit_tiles(multiplied(hidden), head):
        moments.add(tile)
    return LogpStats(*(spread(rows, t, labels.shape[0]) for t in moments.stats()))


SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float? softcap, "
    "float logit_scale, int ignore_index) "
    "-> (Tensor logp, Tensor correct, Tensor entropy, Tensor variance)"
)


def fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs, for torch.compile."""
    logp = hidden.new_empty(hidden.shape[:1], dtype=accumulate_dtype(hidden.dtype))
    correct = torch.empty_like(logp, dtype=torch.bool)
    return logp, correct, torch.empty_like(logp), torch.empty_like(logp)


registry.compose("linear_logp_stats", SCHEMA, stats, check, fake=fake)


@torch.no_grad()
def linear_logp_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> LogpStats:
    """(logp, correct, entropy, variance), each [rows], of logits that are never all in memory.

    What evaluations are made of: probability and perplexity (logp), exact match and extraction
    strength (correct), min-k (logp) and min-k++, whose score of a token is (logp + entropy) /
    sqrt(variance) (Zhang et al. 2024).

    Without gradient. Arguments, memory and errors as ``linear_logp``; two tiles of logits. fp32
    (fp64 for fp64); correct is bool, by the first of equally large logits. Rows whose label is
    ignored hold 0 and False.
    """
    arguments = given(hidden, weight, labels, bias, softcap, logit_scale, ignore_index)
    return LogpStats(*registry.op("linear_logp_stats")(*arguments))
