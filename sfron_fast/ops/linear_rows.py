"""Row arithmetic of a tile of logits: in plain torch, on a GPU in Triton.

On a CPU a tenth of the time of the products of matrices around it, so torch serves there. No ops of
their own: only the ops over heads call them, within their own calls.
"""

from typing import Any

import torch
from torch import Tensor

from . import triton
from .dtypes import only_reference

LEAST = -1e4  # e^ of it is 0, times it too; of -inf it would be NaN


def column_of(labels: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """labels [rows] -> columns of the tile [rows, 1]; whether the label is there [rows]."""
    inside = (labels >= start) & (labels < start + columns)
    return (labels - start).clamp(0, columns - 1).unsqueeze(1), inside


def shift_of(maximum: Tensor) -> Tensor:
    """What is subtracted from logits with that maximum: 0 where it is infinite."""
    return torch.where(maximum.isinf(), 0.0, maximum)


def settled(values: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """values [rows, columns] become x - shift; the maximum [rows] is the new one.

    Returns what sums of e^(x - shift) so far are times now, and by how much x - shift has grown.
    """
    before = maximum.clone()
    torch.maximum(before, values.amax(dim=1), out=maximum)
    shift = shift_of(maximum)
    values.sub_(shift.unsqueeze(1))
    # -inf - (-inf) is NaN
    rescaled = torch.where(before == maximum, 1.0, (before - maximum).exp())
    return rescaled, shift_of(before) - shift


def relative(
    values: Tensor, labels: Tensor, start: int, maximum: Tensor, picked: Tensor
) -> tuple[Tensor, Tensor]:
    """``settled``, then -inf at the label; ``picked`` [rows] the label's logit where it is here."""
    column, inside = column_of(labels, start, values.shape[1])
    picked.copy_(torch.where(inside, values.gather(1, column).squeeze(1), picked))
    found = settled(values, maximum)
    kept = values.gather(1, column)
    values.scatter_(1, column, kept.where(~inside.unsqueeze(1), -torch.inf))
    return found


def add_log_sums(
    values: Tensor,
    labels: Tensor,
    start: int,
    maximum: Tensor,
    others: Tensor,
    picked: Tensor,
    keep: bool,
) -> None:
    """Adds a tile to the rows' maxima, sums of e^(x - shift) without the label, and labels' logits,
    each [rows]; without ``keep`` the values may be overwritten.
    """
    values = values.clone() if keep else values
    rescaled, _ = relative(values, labels, start, maximum, picked)
    others.mul_(rescaled).add_(values.exp_().sum(dim=1))


def slope_of(logits: Tensor, softcap: float) -> Tensor:
    """d softcap tanh(z / softcap) / d z = 1 - tanh^2, of the capped logits."""
    tanh = logits / softcap
    return (1.0 - tanh).mul_(tanh.add_(1.0))


def gradient(
    values: Tensor,
    labels: Tensor,
    start: int,
    shift: Tensor,
    factor: Tensor,
    label: Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """From logits x [rows, columns] to factor e^(x - shift), ``label`` at the label, times the
    slope of the cap, in ``dtype``; the values are overwritten. shift, factor, label [rows].
    """
    column, inside = column_of(labels, start, values.shape[1])
    slope = None if softcap is None else slope_of(values, softcap)
    values.sub_(shift.unsqueeze(1)).exp_().mul_(factor.unsqueeze(1))
    at_label = torch.where(inside.unsqueeze(1), label.unsqueeze(1), values.gather(1, column))
    values.scatter_(1, column, at_label)
    if slope is not None:
        values.mul_(slope)
    return values.to(dtype)


def add_moments(
    values: Tensor,
    labels: Tensor,
    start: int,
    maximum: Tensor,
    others: Tensor,
    picked: Tensor,
    first: Tensor,
    second: Tensor,
    argmax: Tensor,
) -> None:
    """As ``add_log_sums``, and to sums of e^(x - shift) (x - shift)^n, n = 1, 2, without the label,
    and the first of the largest classes so far, each [rows]; the values may be overwritten.
    """
    largest, at = values.max(dim=1)
    argmax.copy_(torch.where(largest > maximum, at + start, argmax))
    rescaled, moved = relative(values, labels, start, maximum, picked)
    values.clamp_min_(LEAST)
    # sums of powers of what has grown by `moved`; of nothing, whatever that is
    moved = torch.where(others == 0, 0.0, moved)
    second.add_(moved * (2.0 * first + moved * others))
    first.add_(moved * others)
    powers = values.exp()
    others.mul_(rescaled).add_(powers.sum(dim=1))
    first.mul_(rescaled).add_(powers.mul_(values).sum(dim=1))
    second.mul_(rescaled).add_(powers.mul_(values).sum(dim=1))


def add_kl_sums(
    values: Tensor,
    teacher: Tensor,
    maximum: Tensor,
    sums: Tensor,
    teacher_maximum: Tensor,
    teacher_sums: Tensor,
    cross: Tensor,
) -> None:
    """Adds tiles of the logits x and the teacher's t to the rows' maxima, sums of e^(x - shift) and
    of e^(t - shift), and of e^(t - shift) ((t - shift) - (x - shift)), each [rows], each shift the
    own; the values may be overwritten.
    """
    rescaled, moved = settled(values, maximum)
    teacher_rescaled, teacher_moved = settled(teacher, teacher_maximum)
    before = teacher_sums * (teacher_moved - moved)
    cross.add_(torch.where(teacher_sums == 0, 0.0, before)).mul_(teacher_rescaled)
    power = teacher.exp()
    difference = teacher.sub_(values)
    # what the teacher forbids adds nothing, also where the logits forbid it, too
    difference.masked_fill_(power == 0, 0.0)
    cross.add_(difference.mul_(power).sum(dim=1))
    teacher_sums.mul_(teacher_rescaled).add_(power.sum(dim=1))
    sums.mul_(rescaled).add_(values.exp_().sum(dim=1))


def kl_gradient(
    values: Tensor,
    teacher: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    teacher_shift: Tensor,
    teacher_log_sum: Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """softmax(logits) - softmax(teacher), times the slope of the cap, in ``dtype``; both tiles are
    overwritten. The others [rows].
    """
    slope = None if softcap is None else slope_of(values, softcap)
    numbers = (t.unsqueeze(1) for t in (shift, log_sum, teacher_shift, teacher_log_sum))
    shift, log_sum, teacher_shift, teacher_log_sum = numbers
    teacher.sub_(teacher_shift).sub_(teacher_log_sum).exp_()
    values.sub_(shift).sub_(log_sum).exp_().sub_(teacher)
    if slope is not None:
        values.mul_(slope)
    return values.to(dtype)


def _no_check(*arguments: Any) -> None:
    """What calls them has checked its own."""


_plain: dict[str, Any] = {
    "linear_log_sums_": add_log_sums,
    "linear_gradient": gradient,
    "linear_moments_": add_moments,
    "linear_kl_sums_": add_kl_sums,
    "linear_kl_gradient": kl_gradient,
}
_on_cuda = {name: triton.op_kernel(name, _no_check, plain) for name, plain in _plain.items()}


def serving(name: str, values: Tensor) -> Any:
    """The one of these names, for the device and dtype of the values."""
    own = values.is_cuda and not only_reference(values.dtype)
    return (_on_cuda if own else _plain)[name]
