"""The divergence of two heads tile by tile, and its gradient at the first one's hidden states.

Both make the logits of a tile at once: the student's, and the teacher's with the label's lowered.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .linear_rows import column_of, slope_of
from .linear_tiles import (
    Head,
    LogSums,
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
            column, inside = column_of(labels, other.start, other.values.shape[1])
            moved = torch.where(inside, -label_shift, 0.0).to(other.values.dtype)
            other.values.scatter_add_(1, column, moved.unsqueeze(1))
        yield tile, other


class Sums:
    """Sums of rows, tile by tile: of e^(x - m) for the logits and the teacher, m each one's maximum
    so far, and of e^(teacher - m) ((teacher - m) - (logits - m)).
    """

    def __init__(self, labels: Tensor, like: Tensor) -> None:
        # with no label of theirs, which would be left out
        self.logits, self.teacher = (LogSums(torch.full_like(labels, -1), like) for _ in range(2))
        self.cross = torch.zeros_like(self.logits.others)

    def add(self, tile: Tile, other: Tile) -> None:
        """The tiles' values are overwritten."""
        x_rescaled, x_moved = self.logits.relative(tile)
        t_rescaled, t_moved = self.teacher.relative(other)
        x, t = tile.values, other.values
        before = self.teacher.others
        moved = torch.where(before == 0, 0.0, before * (t_moved - x_moved))
        power = t.exp()
        difference = t.sub_(x)
        # what the teacher forbids adds nothing, also where the logits forbid it, too
        difference.masked_fill_(power == 0, 0.0)
        self.cross = (self.cross + moved) * t_rescaled + difference.mul_(power).sum(dim=1)
        self.teacher.others = self.teacher.others * t_rescaled + power.sum(dim=1)
        self.logits.others = self.logits.others * x_rescaled + x.exp_().sum(dim=1)

    def result(self) -> tuple[Tensor, Tensor]:
        """KL [rows]; log_sums [4, rows]: shift and log sum of the logits, then of the teacher."""
        logits, teacher = self.logits.others.log(), self.teacher.others.log()
        kl = self.cross / self.teacher.others - teacher + logits
        return kl, torch.stack([self.logits.shift(), logits, self.teacher.shift(), teacher])


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
    q_shift, q_log, p_shift, p_log = (t.unsqueeze(1) for t in taken(rows, *log_sums))

    def deltas() -> Iterator[Tile]:
        tiles = pairs(hidden, head, teacher_hidden, teacher, labels, label_shift)
        for tile, other in tiles:
            slope = None if softcap is None else slope_of(tile.values, softcap)
            other.values.sub_(p_shift).sub_(p_log).exp_()
            tile.values.sub_(q_shift).sub_(q_log).exp_().sub_(other.values)
            if slope is not None:
                tile.values.mul_(slope)
            yield tile._replace(values=tile.values.to(hidden.dtype))

    return head_gradients(deltas(), hidden, head, grad, needed).returned(rows, total, weight)
