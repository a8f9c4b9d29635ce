"""Row arithmetic of a tile of a head's logits: log-sums in one reading, the gradient in one.

``linear_rows.py`` beside the ops says what they compute; a program takes a row, or a block of one.
Arithmetic is fp32. Row offsets have 64 bits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import exp

BLOCK = 4096  # logits of one program at a time
WARPS = 8


@triton.jit
def shifted(maximum):
    """What is subtracted: 0 where the maximum is infinite."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def rescaling(most, now):
    """What sums so far are multiplied by, when the maximum grows to ``now``."""
    return tl.where(most == now, 1.0, exp(most - now))  # -inf - (-inf) is NaN


@triton.jit
def through_cap(value, x, inverse_cap, CAPPED: tl.constexpr):
    """Of the gradient ``value`` of capped logits ``x``, what reaches the logits before."""
    if CAPPED:
        tanh = x * inverse_cap
        value *= (1.0 - tanh) * (1.0 + tanh)
    return value


@triton.jit(do_not_specialize=("start",))
def _log_sums_kernel(
    values_ptr,  # fp32 [rows, columns]
    labels_ptr,  # int64 [rows]
    maximum_ptr,  # fp32 [rows], this and the next two read and written
    others_ptr,
    picked_ptr,
    start,
    columns,
    BLOCK: tl.constexpr,
):
    """A row of the tile."""
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * columns
    label = tl.load(labels_ptr + row) - start
    most, others = tl.load(maximum_ptr + row), tl.load(others_ptr + row)
    for at in range(0, columns, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(values_ptr + column, mask=inside, other=-float("inf"))
        now = tl.maximum(most, tl.max(x, 0))
        power = exp(x - shifted(now))
        power = tl.where(inside & (column != label), power, 0.0)
        others = others * rescaling(most, now) + tl.sum(power, 0)
        most = now
    tl.store(maximum_ptr + row, most)
    tl.store(others_ptr + row, others)
    here = (label >= 0) & (label < columns)
    picked = tl.load(values_ptr + label, mask=here, other=0.0)
    tl.store(picked_ptr + row, picked, mask=here)


@triton.jit(do_not_specialize=("start", "blocks"))
def _gradient_kernel(
    values_ptr,  # fp32 [rows, columns]
    labels_ptr,  # int64 [rows]
    shift_ptr,  # fp32 [rows], as the next two
    factor_ptr,
    label_ptr,
    start,
    out_ptr,  # [rows, columns], perhaps the values' memory
    columns,
    blocks,  # of a row
    inverse_cap,  # 1 / softcap
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a row."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    label = tl.load(labels_ptr + row) - start
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(values_ptr + row * columns + column, mask=inside, other=0.0)
    value = exp(x - tl.load(shift_ptr + row)) * tl.load(factor_ptr + row)
    value = tl.where(column == label, tl.load(label_ptr + row), value)
    out = through_cap(value, x, inverse_cap, CAPPED).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * columns + column, out, mask=inside)


def over_rows(kernel: Any, values: Tensor, *arguments: Any) -> None:
    """A program for each row of a tile: ``kernel(values, *arguments, columns)``."""
    rows, columns = values.shape
    if rows == 0:
        return
    with common.on_device(values):
        kernel[(rows,)](
            values,
            *arguments,
            columns,
            BLOCK=min(BLOCK, common.power_of_two(columns)),
            num_warps=WARPS,
            **common.STRICT,
        )


def over_blocks(
    kernel: Any, values: Tensor, *arguments: Any, softcap: float | None, out: Tensor
) -> None:
    """A program for each block of a row: ``kernel(values, *arguments, out, columns, blocks,
    inverse_cap)``; the result may take the memory of the values.
    """
    rows, columns = values.shape
    if rows == 0:
        return
    block = min(BLOCK, common.power_of_two(columns))
    blocks = triton.cdiv(columns, block)
    with common.on_device(values):
        kernel[(rows * blocks,)](
            values,
            *arguments,
            out,
            columns,
            blocks,
            0.0 if softcap is None else 1.0 / softcap,
            CAPPED=softcap is not None,
            BLOCK=block,
            num_warps=WARPS,
            **common.STRICT,
        )


def linear_log_sums_(
    values: Tensor,
    labels: Tensor,
    start: int,
    maximum: Tensor,
    others: Tensor,
    picked: Tensor,
) -> None:
    """Launches what ``linear_rows.add_log_sums`` computes."""
    over_rows(_log_sums_kernel, values, labels, maximum, others, picked, start)


def linear_gradient_(
    values: Tensor,
    labels: Tensor,
    start: int,
    shift: Tensor,
    factor: Tensor,
    label: Tensor,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Launches what ``linear_rows.gradient`` computes."""
    tensors = labels, shift, factor, label
    over_blocks(_gradient_kernel, values, *tensors, start, softcap=softcap, out=out)
