"""The divergence of two heads tile by tile, and its gradient at the first one's hidden states.

Both make the logits of a tile at once: the student's, and the teacher's with the label's lowered.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import linear_rows
from .dtypes import accumulate_dtype
from .linear_tiles import (
    Head,
    Tile,
    counted_rows,
    head_gradients,
    logit_tiles,
    multiplied,
    spread,
    taken,
)


def pairs(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    labels: Tensor,
    label_shift: float,
) -> Iterator[tuple[Tile, Tile]]:
    """Tiles of the logits, and of the teacher's with the label's lowered."""
    student_tiles, teacher_tiles = logit_tiles(hidden, head), logit_tiles(teacher_hidden, teacher)
    for tile, other in zip(student_tiles, teacher_tiles, strict=True):
        if label_shift != 0.0:
            column, inside = linear_rows.column_of(labels, other.start, other.values.shape[1])
            moved = torch.where(inside, -label_shift, 0.0).to(other.values.dtype)
            other.values.scatter_add_(1, column, moved.unsqueeze(1))
        yield tile, other


class Sums:
    """Sums of rows, tile by tile, as ``linear_rows.add_kl_sums`` has them."""

    def __init__(self, labels: Tensor, like: Tensor) -> None:
        dtype = accumulate_dtype(like.dtype)
        self.maximum, self.teacher_maximum = (
            like.new_full(labels.shape, -torch.inf, dtype=dtype) for _ in range(2)
        )
        self.sums, self.teacher_sums, self.cross = (
            like.new_zeros(labels.shape, dtype=dtype) for _ in range(3)
        )

    def add(self, tile: Tile, other: Tile) -> None:
        """The tiles' values may be overwritten."""
        add = linear_rows.serving("linear_kl_sums_", tile.values)
        teacher = self.teacher_maximum, self.teacher_sums, self.cross
        add(tile.values, other.values, self.maximum, self.sums, *teacher)

    def result(self) -> tuple[Tensor, Tensor]:
        """KL [rows]; log_sums [4, rows]: shift and log sum of the logits, then of the teacher."""
        shift, teacher_shift = (
            linear_rows.shift_of(t) for t in (self.maximum, self.teacher_maximum)
        )
        logits, teacher = self.sums.log(), self.teacher_sums.log()
        kl = self.cross / self.teacher_sums - teacher + logits
        return kl, torch.stack([shift, logits, teacher_shift, teacher])


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    label_shift: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """KL [rows], and the log_sums of ``Sums`` [4, rows]; 0 where ignored."""
    rows, total = counted_rows(labels, ignore_index), labels.shape[0]
    head = Head(weight, bias, softcap, logit_scale)
    teacher = Head(teacher_weight, teacher_bias, softcap, logit_scale)
    hidden, teacher_hidden, labels = taken(rows, hidden, teacher_hidden, labels)
    sums = Sums(labels, hidden)
    both = multiplied(hidden), multiplied(teacher_hidden)
    for tile, other in pairs(both[0], head, both[1], teacher, labels, label_shift):
        sums.add(tile, other)
    kl, log_sums = sums.result()
    return spread(rows, kl, total), torch.stack([spread(rows, t, total) for t in log_sums])


def gradient(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    log_sums: Tensor,
    label_shift: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, weight and bias; empty where not needed. At the logits grad * (q - p)."""
    rows, total = counted_rows(labels, ignore_index), labels.shape[0]
    head = Head(weight, bias, softcap, logit_scale)
    teacher = Head(teacher_weight, teacher_bias, softcap, logit_scale)
    grad, hidden, teacher_hidden, labels = taken(
        rows, grad, multiplied(hidden), multiplied(teacher_hidden), labels
    )
    log_sums = torch.stack(taken(rows, *log_sums))

    def deltas() -> Iterator[Tile]:
        tiles = pairs(hidden, head, teacher_hidden, teacher, labels, label_shift)
        for tile, other in tiles:
            convert = linear_rows.serving("linear_kl_gradient", tile.values)
            yield tile._replace(
                values=convert(tile.values, other.values, *log_sums, softcap, hidden.dtype)
            )

    return head_gradients(deltas(), hidden, head, grad, needed).returned(rows, total, weight)
