"""Row arithmetic of a tile of logits, which the ops over heads call between products of matrices.

Log-sums and the gradient are ops, with kernels for CPU and GPU. What evaluations and teachers need
besides is plain torch, on a GPU Triton, and no op.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import registry, triton
from .arguments import floats, in_place
from .dtypes import accumulate_dtype, only_reference
from .rows import in_place_kernel

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
) -> None:
    """Adds a tile [rows, columns], of the classes from ``start`` on, to the rows' maxima, sums of
    e^(x - shift) without the label, and labels' logits, each [rows].
    """
    values = values.clone()
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
    out: Tensor,
) -> None:
    """From logits x [rows, columns] to factor e^(x - shift), ``label`` at the label, times the
    slope of the cap, in ``out``, which may be the logits' memory. shift, factor, label [rows].
    """
    column, inside = column_of(labels, start, values.shape[1])
    found = (values - shift.unsqueeze(1)).exp_().mul_(factor.unsqueeze(1))
    at_label = torch.where(inside.unsqueeze(1), label.unsqueeze(1), found.gather(1, column))
    found.scatter_(1, column, at_label)
    out.copy_(found if softcap is None else found.mul_(slope_of(values, softcap)))


def check_tile(values: Tensor, labels: Tensor, start: int, **rows: Tensor) -> None:
    """What both ops demand: fp32 (fp64) values [rows, columns]; the others [rows]."""
    require(
        values.dim() == 2 and values.shape[1] > 0, "values", "[rows, columns]", tuple(values.shape)
    )
    wide = values.dtype in (torch.float32, torch.float64)
    require(wide, "values", "float32 or float64", values.dtype)
    require(start >= 0, "start", "a class, 0 or more", start)
    size = values.shape[0]
    for name, tensor in {"labels": labels, **rows}.items():
        dtype = torch.int64 if name == "labels" else values.dtype
        require(tensor.device == values.device, name, f"device {values.device}", tensor.device)
        require(tensor.shape == (size,), name, f"shape ({size},)", tuple(tensor.shape))
        require(tensor.dtype == dtype, name, f"dtype {dtype}", tensor.dtype)
    for name, tensor in {"values": values, "labels": labels, **rows}.items():
        in_place(name, tensor)


def check_log_sums(
    values: Tensor, labels: Tensor, start: int, maximum: Tensor, others: Tensor, picked: Tensor
) -> None:
    """What the op demands; raises ValueError."""
    check_tile(values, labels, start, maximum=maximum, others=others, picked=picked)


def check_gradient(
    values: Tensor,
    labels: Tensor,
    start: int,
    shift: Tensor,
    factor: Tensor,
    label: Tensor,
    softcap: float | None,
    out: Tensor,
) -> None:
    """What the op demands; raises ValueError."""
    check_tile(values, labels, start, shift=shift, factor=factor, label=label)
    if softcap is not None:
        number("softcap", softcap, 0.0, open_low=True)
    floats("out", [out])
    require(out.device == values.device, "out", f"device {values.device}", out.device)
    require(out.shape == values.shape, "out", f"shape {tuple(values.shape)}", tuple(out.shape))
    same = accumulate_dtype(out.dtype) == values.dtype
    require(same, "out", f"{values.dtype} or narrower", out.dtype)
    in_place("out", out)


registry.define(
    "linear_log_sums_",
    "(Tensor values, Tensor labels, int start, Tensor(a!) maximum, Tensor(b!) others, "
    "Tensor(c!) picked) -> ()",
    add_log_sums,
    check_log_sums,
)
registry.define(
    "linear_gradient_",
    "(Tensor values, Tensor labels, int start, Tensor shift, Tensor factor, Tensor label, "
    "float? softcap, Tensor(a!) out) -> ()",
    gradient,
    check_gradient,
)


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
    and the first of the largest classes so far, each [rows]; but the values may be overwritten.
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
    "linear_moments_": add_moments,
    "linear_kl_sums_": add_kl_sums,
    "linear_kl_gradient": kl_gradient,
}
_on_cuda = {name: triton.op_kernel(name, _no_check, plain) for name, plain in _plain.items()}


def serving(name: str, values: Tensor) -> Any:
    """The op or function of that name, for the device and dtype of the values."""
    if name not in _plain:
        return in_place_kernel(name, values.dtype)
    own = values.is_cuda and not only_reference(values.dtype)
    return (_on_cuda if own else _plain)[name]
