"""Squares of a layer's per-sample gradients: a tile of the accumulator stays in registers while its
program goes over all samples, whose sums over positions are matrix products on the tensor cores
(fp32 inputs: exact products on the ordinary ones).
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import widen

# copies of factors whose samples are no matrix in memory (a convolution's patches): so many bytes
# at a time, or one sample's
WORKSPACE = 64 << 20
TILES = (64, 32, 16)  # rows and columns of a program; the largest that gives every processor one
PROCESSORS = 132

UNSPECIALISED = ("samples", "positions", "row_groups", "column_groups")


@triton.jit
def _add(total, sums, weight, POWER: tl.constexpr):
    """One more sample."""
    if POWER == 1:
        return total + tl.abs(sums) * weight
    else:
        return total + (sums * sums) * weight


@triton.jit(do_not_specialize=UNSPECIALISED)
def _sample_square_accumulate_kernel(
    accumulator_ptr,  # fp32 [rows, columns]
    deltas_ptr,  # [samples, positions, rows]
    inputs_ptr,  # [samples, positions, columns]
    samples,
    positions,
    row_groups,  # rows / ROW_ALIGN
    column_groups,  # columns / COLUMN_ALIGN
    weight,
    ROW_ALIGN: tl.constexpr,
    COLUMN_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,  # 1: one position a sample, products are sums
    POWER: tl.constexpr,
):
    rows, columns = row_groups * ROW_ALIGN, column_groups * COLUMN_ALIGN
    tiles = tl.cdiv(columns, COLUMNS)
    first_row = (tl.program_id(0) // tiles) * ROWS
    first_column = (tl.program_id(0) % tiles) * COLUMNS
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < columns
    deltas_ptr += first_row
    inputs_ptr += first_column
    at = accumulator_ptr + first_row.to(tl.int64) * columns + first_column
    at = at + tl.arange(0, ROWS)[:, None] * columns + tl.arange(0, COLUMNS)[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    total = tl.load(at, mask=inside, other=0.0)
    lane_row, lane_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    for sample in range(samples):
        start = tl.cast(sample, tl.int64) * positions
        if DEPTH == 1:
            delta = tl.load(deltas_ptr + start * rows + lane_row, mask=row_inside, other=0.0)
            x = tl.load(inputs_ptr + start * columns + lane_column, mask=column_inside, other=0.0)
            sums = widen(delta)[:, None] * widen(x)[None, :]
        else:
            sums = tl.zeros([ROWS, COLUMNS], tl.float32)
            for position in range(0, positions, DEPTH):
                line = tl.arange(0, DEPTH)
                read = line < positions - position
                delta = tl.load(
                    deltas_ptr
                    + (start + position) * rows
                    + line[None, :] * rows
                    + lane_row[:, None],
                    mask=row_inside[:, None] & read[None, :],
                    other=0.0,
                )
                x = tl.load(
                    inputs_ptr
                    + (start + position) * columns
                    + line[:, None] * columns
                    + lane_column[None, :],
                    mask=read[:, None] & column_inside[None, :],
                    other=0.0,
                )
                sums = tl.dot(delta, x, sums, input_precision="ieee")
        total = _add(total, sums, weight, POWER)
    tl.store(at, total, mask=inside)


def sample_square_accumulate_(
    accumulator: Tensor, deltas: Tensor, inputs: Tensor, weight: float, power: int
) -> None:
    """Launches ``sfron_fast::sample_square_accumulate_``: the op's arguments, already checked."""
    if accumulator.numel() == 0 or deltas.numel() == 0:
        return
    positions = math.prod(deltas.shape[1:-1])
    rows, columns = accumulator.shape[0], math.prod(accumulator.shape[1:])
    align_rows, align_columns = common.alignment(rows), common.alignment(columns)
    tile, depth, programs, warps = partition(rows, columns, deltas.dtype)
    with common.on_device(accumulator):
        for d, x in pieces(deltas, inputs):
            _sample_square_accumulate_kernel[(programs,)](
                accumulator,
                d,
                x,
                d.shape[0],
                positions,
                rows // align_rows,
                columns // align_columns,
                float(weight),
                ROW_ALIGN=align_rows,
                COLUMN_ALIGN=align_columns,
                ROWS=tile,
                COLUMNS=tile,
                DEPTH=1 if positions == 1 else depth,
                POWER=power,
                num_warps=warps,
                **common.STRICT,
            )


def partition(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(side of a tile, positions at a time, programs, warps of each)."""
    for tile in TILES:
        programs = triton.cdiv(rows, tile) * triton.cdiv(columns, tile)
        if programs >= PROCESSORS:
            break
    warps = max(tile * tile // 1024, 1)
    if dtype == torch.float32:  # its operands pass through registers, of which there are so many
        return tile, 16, programs, 2 * warps
    return tile, 32, programs, warps


def pieces(deltas: Tensor, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, contiguous, in as few pieces of samples as WORKSPACE allows: whatever is not so in
    memory is copied to a buffer that all pieces share.
    """
    factors = (deltas, inputs)
    copied = [f for f in factors if not f.is_contiguous()]
    if not copied:
        yield factors
        return
    bytes_each = sum(f[0].numel() * f.element_size() for f in copied)
    size = min(max(WORKSPACE // bytes_each, 1), deltas.shape[0])
    buffers = [
        None
        if f.is_contiguous()
        else torch.empty_like(f[:size], memory_format=torch.contiguous_format)
        for f in factors
    ]
    for parts in zip(*(f.split(size) for f in factors), strict=True):
        found = []
        for part, buffer in zip(parts, buffers, strict=True):
            found.append(part if buffer is None else buffer[: len(part)].copy_(part))
        yield found[0], found[1]
