"""Weighted losses of samples and their gradients, while the logits of whole samples are in memory.

``chunks`` cuts labelled rows between samples; ``one_pass`` makes a chunk's logits, its samples'
losses and weights, and then the gradients.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .linear_tiles import (
    Gradients,
    Head,
    LogSums,
    head_gradients,
    logit_tiles,
    multiplied,
    softmax_tiles,
)

# losses of a slice of the samples -> raw weights, or these and what the normaliser adds up instead
Weigh = Callable[[Tensor, slice], Tensor | tuple[Tensor, Tensor]]
# the same, checked: always both
Rule = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class LinearLoss(NamedTuple):
    """Only ``loss`` has a gradient."""

    loss: Tensor  # []
    losses: Tensor  # [samples]: means over the labelled rows, 0 without any
    weights: Tensor  # [samples]: what each loss is multiplied with
    normaliser: Tensor  # []: sum of the raw weights, or of what the rule gives for it


class Samples(NamedTuple):
    """Labelled rows, those of a sample together."""

    rows: Tensor | None  # [counted] indices of them, None = all, as they are
    sample: Tensor  # [counted], ascending: of each
    tokens: Tensor  # [samples]: how many rows each has

    def mean(self, values: Tensor, first: int, last: int, begin: int, end: int) -> Tensor:
        """Of values [end - begin], of rows [begin, end), for samples [first, last)."""
        sums = values.new_zeros(last - first).index_add_(0, self.sample[begin:end] - first, values)
        return sums / self.tokens[first:last].clamp_min(1)


def samples_of(labels: Tensor, sample_index: Tensor | None, ignore_index: int) -> Samples:
    """A GPU is waited for."""
    counted = labels != ignore_index
    every = bool(counted.all())
    if sample_index is None:
        index = torch.arange(labels.shape[0], device=labels.device)
        found = None if every else index[counted]
        return Samples(found, index if every else index[counted], counted.long())
    count = int(sample_index.max()) + 1 if labels.numel() else 0
    tokens = torch.bincount(sample_index[counted], minlength=count)
    if every and bool((sample_index.diff() >= 0).all()):
        return Samples(None, sample_index, tokens)
    order = counted.nonzero().squeeze(1)
    order = order[sample_index[order].argsort(stable=True)]
    return Samples(order, sample_index[order], tokens)


def chunks(tokens: list[int], room: int) -> Iterator[tuple[int, int, int, int]]:
    """Samples [first, last) and rows [begin, end) of at most ``room`` rows a chunk."""
    first = begin = end = 0
    for sample, more in enumerate(tokens):
        if end + more - begin > room:
            yield first, sample, begin, end
            first, begin = sample, end
        end += more
    yield first, len(tokens), begin, end


def chunk_rows(rows: int, weight: Tensor, longest: int, limit: int) -> int:
    """How many rows ``limit`` bytes let a chunk have; 0 where the longest sample does not fit."""
    classes, features = weight.shape
    if limit >= 4 * classes * rows:
        return max(rows, 1)
    # d / d weight of all chunks; of fp32 weights it is the gradient itself
    summed = weight.requires_grad and weight.dtype != torch.float32
    fitting = (limit - 4 * classes * features * summed) // (4 * classes)
    return fitting if fitting >= longest else 0


def one_pass(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    samples: Samples,
    room: int,
    weigh: Rule,
    normalise: bool,
    needed: list[bool],
) -> tuple[LinearLoss, Gradients]:
    """Loss and gradients, chunk by chunk; hidden, labels: of the labelled rows, in order."""
    parts = list(chunks(samples.tokens.tolist(), room))
    to_hidden = torch.empty_like(hidden, dtype=torch.float32) if needed[0] else None
    sums = Gradients(None, None, None)
    several = len(parts) > 1
    if several:
        to_weight, to_bias = (
            torch.zeros_like(t, dtype=torch.float32) if need and t is not None else None
            for t, need in ((head.weight, needed[1]), (head.bias, needed[2]))
        )
        sums = Gradients(None, to_weight, to_bias)
    found = []
    most = max(end - begin for *_, begin, end in parts)
    memory = hidden.new_empty(most * head.weight.shape[0], dtype=torch.float32)
    for first, last, begin, end in parts:
        label, part = labels[begin:end], multiplied(hidden[begin:end])
        tiles = list(logit_tiles(part, head, memory))
        log_sums = LogSums(label, part)
        for tile in tiles:
            log_sums.add(tile)
        logp, shift, log_sum = log_sums.result()
        losses = samples.mean(-logp, first, last, begin, end)
        tokens = samples.tokens[first:last]
        raw, shares = weighed(weigh, losses, tokens, slice(first, last))
        found.append((losses, raw, shares))
        if normalise and not several:
            raw = divided(raw, shares.sum())
        row_weights = (raw / tokens.clamp_min(1)).float()[samples.sample[begin:end] - first]
        ones = torch.ones_like(logp)
        deltas = softmax_tiles(
            tiles, head, label, torch.stack([shift, log_sum]), ones, torch.expm1(logp), part.dtype
        )
        gradients = head_gradients(
            deltas, part, head, row_weights, needed, sums if several else None
        )
        if to_hidden is not None and gradients.hidden is not None:
            to_hidden[begin:end] = gradients.hidden
        sums = gradients
    losses, raw, shares = (torch.cat(list(t)) for t in zip(*found, strict=True))
    normaliser = shares.sum()
    weights = divided(raw, normaliser) if normalise else raw
    if normalise and several:
        factor = divided(torch.ones_like(normaliser), normaliser).float()
        for t in (to_hidden, sums.weight, sums.bias):
            if t is not None:
                t *= factor
    loss = (weights * losses).sum()
    result = LinearLoss(*(t.float() for t in (loss, losses, weights, normaliser)))
    return result, Gradients(to_hidden, sums.weight, sums.bias)


def weighed(weigh: Rule, losses: Tensor, tokens: Tensor, samples: slice) -> tuple[Tensor, Tensor]:
    """Raw weights, and shares of the normaliser [k]: 0 for samples without a label."""
    raw, shares = (torch.where(tokens > 0, t, 0.0) for t in weigh(losses, samples))
    return raw, shares


def divided(raw: Tensor, normaliser: Tensor) -> Tensor:
    """0 where there is nothing to divide."""
    return torch.where(raw == 0, 0.0, raw / normaliser)
