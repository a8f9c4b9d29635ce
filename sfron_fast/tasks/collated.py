"""What is read from a collator's batch of token sequences, and said of each token."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import require
from ..ops.dtypes import wide
from .labels import IGNORED, checked_cross_entropy
from .task import Units


class Each(NamedTuple):
    """The loss of each position."""

    losses: Tensor  # at least fp32 [rows, positions], 0 where nothing is asked
    counted: Tensor  # bool [rows, positions]
    sample: Tensor | None  # int64 [rows, positions]; None = each row is a sample


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each position, at least fp32 [rows, positions]; of logits [rows,
    positions, classes].
    """
    classes = wide(logits).flatten(0, -2)
    return checked_cross_entropy(classes, labels.flatten(), "none").view(labels.shape)


def packed(batch: dict[str, Any]) -> bool:
    """Whether position ids begin again within a row."""
    positions = batch.get("position_ids")
    if batch.get("attention_mask") is not None or not isinstance(positions, Tensor):
        return False
    return bool((positions[:, 1:] == 0).any())


def assistant_labels(batch: dict[str, Any], name: str) -> Tensor:
    """Of a chat, labels where the assistant speaks."""
    masks, tokens = batch.get("assistant_masks"), batch.get("input_ids")
    remedy = (
        "let the collator give labels, -100 where nothing is to be learnt, or tokenise chats with"
        " apply_chat_template(..., return_dict=True, return_assistant_tokens_mask=True)"
    )
    both = isinstance(masks, Tensor) and isinstance(tokens, Tensor)
    require(both, name, "batches with labels", f"only {', '.join(map(str, batch))}", remedy)
    assert isinstance(masks, Tensor)
    assert isinstance(tokens, Tensor)
    speaks = bool(masks.any())
    template = "mark the assistant's turn in the chat template by {% generation %}"
    require(speaks, name, "a token of the assistant in assistant_masks", "none", template)
    return tokens.masked_fill(masks == 0, IGNORED)


def rows_of(each: Each) -> Tensor:
    """The sample of each position [rows, positions]."""
    if each.sample is not None:
        return each.sample
    rows = torch.arange(len(each.counted), device=each.counted.device)
    return rows.unsqueeze(1).expand_as(each.counted)


def sums(each: Each, samples: int) -> tuple[Tensor, Tensor]:
    """Each sequence's summed loss, and how many tokens it is of: [samples]."""
    losses, counted, sample = each
    if sample is None:
        return losses.sum(1), counted.sum(1)
    place = sample.flatten()
    lengths = place.new_zeros(samples).index_add(0, place, counted.flatten().long())
    return losses.new_zeros(samples).index_add(0, place, losses.flatten()), lengths


def units_of(each: Each, samples: int) -> Units:
    """The labelled tokens, sample after sample."""
    sample = rows_of(each)[each.counted]
    order = sample.argsort(stable=True)
    lengths = torch.bincount(sample, minlength=samples)
    return Units(each.losses[each.counted][order], sample[order], lengths)
