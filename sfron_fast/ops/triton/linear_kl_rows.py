"""Row arithmetic of two tiles of logits, a head's and its teacher's: the sums of their divergence
in one reading, its gradient in one.

``linear_rows.py`` beside the ops says what they compute; a program takes a row, or a block of one.
Arithmetic is fp32. Row offsets have 64 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import exp
from .linear_rows import over_blocks, over_rows, rescaling, shifted, through_cap


@triton.jit
def _kl_sums_kernel(
    values_ptr,  # fp32 [rows, columns], as the next
    teacher_ptr,
    maximum_ptr,  # fp32 [rows], this and the others read and written
    sums_ptr,
    teacher_maximum_ptr,
    teacher_sums_ptr,
    cross_ptr,
    columns,
    BLOCK: tl.constexpr,
):
    """A row of both tiles."""
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * columns
    teacher_ptr += row * columns
    most, sums = tl.load(maximum_ptr + row), tl.load(sums_ptr + row)
    t_most, t_sums = tl.load(teacher_maximum_ptr + row), tl.load(teacher_sums_ptr + row)
    cross = tl.load(cross_ptr + row)
    for at in range(0, columns, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(values_ptr + column, mask=inside, other=-float("inf"))
        t = tl.load(teacher_ptr + column, mask=inside, other=-float("inf"))
        now, t_now = tl.maximum(most, tl.max(x, 0)), tl.maximum(t_most, tl.max(t, 0))
        shift, t_shift = shifted(now), shifted(t_now)
        x -= shift
        t -= t_shift
        power = tl.where(inside, exp(x), 0.0)
        t_power = tl.where(inside, exp(t), 0.0)
        # what the teacher forbids adds nothing, also where the logits forbid it, too
        terms = tl.where(t_power == 0.0, 0.0, t_power * (t - x))
        moved = t_sums * ((shifted(t_most) - t_shift) - (shifted(most) - shift))
        moved = tl.where(t_sums == 0.0, 0.0, moved)
        t_rescaled = rescaling(t_most, t_now)
        cross = (cross + moved) * t_rescaled + tl.sum(terms, 0)
        t_sums = t_sums * t_rescaled + tl.sum(t_power, 0)
        sums = sums * rescaling(most, now) + tl.sum(power, 0)
        most, t_most = now, t_now
    tl.store(maximum_ptr + row, most)
    tl.store(sums_ptr + row, sums)
    tl.store(teacher_maximum_ptr + row, t_most)
    tl.store(teacher_sums_ptr + row, t_sums)
    tl.store(cross_ptr + row, cross)


@triton.jit(do_not_specialize=("blocks",))
def _kl_gradient_kernel(
    values_ptr,  # fp32 [rows, columns], as the next
    teacher_ptr,
    shift_ptr,  # fp32 [rows], as the next three
    log_sum_ptr,
    teacher_shift_ptr,
    teacher_log_sum_ptr,
    out_ptr,  # [rows, columns], perhaps the values' memory
    columns,
    blocks,  # of a row
    inverse_cap,  # 1 / softcap
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a row."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < columns, row * columns + column
    x = tl.load(values_ptr + at, mask=inside, other=0.0)
    t = tl.load(teacher_ptr + at, mask=inside, other=0.0)
    q = exp((x - tl.load(shift_ptr + row)) - tl.load(log_sum_ptr + row))
    p = exp((t - tl.load(teacher_shift_ptr + row)) - tl.load(teacher_log_sum_ptr + row))
    value = through_cap(q - p, x, inverse_cap, CAPPED)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def linear_kl_sums_(values: Tensor, teacher: Tensor, *rows: Tensor) -> None:
    """Launches what ``linear_rows.add_kl_sums`` computes; the values stay."""
    over_rows(_kl_sums_kernel, values, teacher, *rows)


def linear_kl_gradient(
    values: Tensor,
    teacher: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    teacher_shift: Tensor,
    teacher_log_sum: Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Launches what ``linear_rows.kl_gradient`` computes; the teacher's values stay."""
    tensors = teacher, shift, log_sum, teacher_shift, teacher_log_sum
    out = values if dtype == values.dtype else torch.empty_like(values, dtype=dtype)
    over_blocks(_kl_gradient_kernel, values, *tensors, softcap=softcap, out=out)
    return out
