"""Row arithmetic of a tile of logits: in plain torch, on a GPU in Triton.

On a CPU a tenth of the time of the products of matrices around it, so torch serves there. No ops of
their own: only the ops over heads call them, within their own calls.
"""

from typing import Any

import torch
from torch import Tensor

from . import triton
from .dtypes import only_reference


def column_of(labels: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """labels [rows] -> columns of the tile [rows, 1]; whether the label is there [rows]."""
    inside = (labels >= start) & (labels < start + columns)
    return (labels - start).clamp(0, columns - 1).unsqueeze(1), inside


def shift_of(maximum: Tensor) -> Tensor:
    """What is subtracted from logits with that maximum: 0 where it is infinite."""
    return torch.where(maximum.isinf(), 0.0, maximum)


def relative(
    values: Tensor, labels: Tensor, start: int, maximum: Tensor, picked: Tensor
) -> tuple[Tensor, Tensor]:
    """values [rows, columns] become x - shift, -inf at the label; the maximum [rows] is the new
    one, ``picked`` [rows] the label's logit where it is here.

    Returns what sums of e^(x - shift) so far are times now, and by how much x - shift has grown.
    """
    column, inside = column_of(labels, start, values.shape[1])
    found = values.gather(1, column)
    picked.copy_(torch.where(inside, found.squeeze(1), picked))
    before = maximum.clone()
    torch.maximum(before, values.amax(dim=1), out=maximum)
    values.scatter_(1, column, found.where(~inside.unsqueeze(1), -torch.inf))
    shift = shift_of(maximum)
    values.sub_(shift.unsqueeze(1))
    # -inf - (-inf) is NaN
    rescaled = torch.where(before == maximum, 1.0, (before - maximum).exp())
    return rescaled, shift_of(before) - shift


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


def _no_check(*arguments: Any) -> None:
    """What calls them has checked its own."""


_on_cuda = {
    "linear_log_sums_": triton.op_kernel("linear_log_sums_", _no_check, add_log_sums),
    "linear_gradient": triton.op_kernel("linear_gradient", _no_check, gradient),
}


def serving(name: str, values: Tensor) -> Any:
    """``linear_log_sums_`` or ``linear_gradient`` for the device and dtype of the values."""
    if values.is_cuda and not only_reference(values.dtype):
        return _on_cuda[name]
    return {"linear_log_sums_": add_log_sums, "linear_gradient": gradient}[name]
