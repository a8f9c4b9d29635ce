"""Log-sums, moments and the largest class of rows of a tile of logits, in one reading.

``linear_rows.py`` beside the ops says what they are; a program takes a row. Arithmetic is fp32. Row
offsets have 64 bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import exp
from .linear_rows import over_rows, rescaling, shifted


@triton.jit(do_not_specialize=("start",))
def _moments_kernel(
    values_ptr,  # fp32 [rows, columns]
    labels_ptr,  # int64 [rows]
    maximum_ptr,  # fp32 [rows], this and the next four read and written
    others_ptr,
    picked_ptr,
    first_ptr,
    second_ptr,
    argmax_ptr,  # int64 [rows], too
    start,
    columns,
    BLOCK: tl.constexpr,
):
    """A row of the tile."""
    row = tl.program_id(0).to(tl.int64)
    values_ptr += row * columns
    label = tl.load(labels_ptr + row) - start
    most, others = tl.load(maximum_ptr + row), tl.load(others_ptr + row)
    first, second = tl.load(first_ptr + row), tl.load(second_ptr + row)
    argmax = tl.load(argmax_ptr + row)
    for at in range(0, columns, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(values_ptr + column, mask=inside, other=-float("inf"))
        largest = tl.max(x, 0)
        place = tl.argmax(x, 0, tie_break_left=True) + at + start
        argmax = tl.where(largest > most, place.to(tl.int64), argmax)
        now = tl.maximum(most, largest)
        shift = shifted(now)
        counted = inside & (column != label)
        x -= shift
        power = tl.where(counted, exp(x), 0.0)
        # 0 times -inf is NaN
        x = tl.where(power == 0.0, 0.0, x)
        moved = tl.where(others == 0.0, 0.0, shifted(most) - shift)
        rescaled = rescaling(most, now)
        second += moved * (2.0 * first + moved * others)
        first += moved * others
        others = others * rescaled + tl.sum(power, 0)
        first = first * rescaled + tl.sum(power * x, 0)
        second = second * rescaled + tl.sum(power * x * x, 0)
        most = now
    tl.store(maximum_ptr + row, most)
    tl.store(others_ptr + row, others)
    tl.store(first_ptr + row, first)
    tl.store(second_ptr + row, second)
    tl.store(argmax_ptr + row, argmax)
    here = (label >= 0) & (label < columns)
    picked = tl.load(values_ptr + label, mask=here, other=0.0)
    tl.store(picked_ptr + row, picked, mask=here)


def linear_moments_(values: Tensor, labels: Tensor, start: int, *rows: Tensor) -> None:
    """Launches what ``linear_rows.add_moments`` computes; the values stay."""
    over_rows(_moments_kernel, values, labels, *rows, start)
