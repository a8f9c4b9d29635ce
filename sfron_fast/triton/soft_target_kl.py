"""KL of a teacher's softmax from the logits', row by row: forward in one launch, backward in one.

Forward reads both tensors once: whole rows, or a long row in pieces with running maxima. The last program to arrive
adds up the rows in a fixed order; no float atomics, so results are repeatable. Rows of weight 0 are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import arrived_last

TILE = 2048  # logits of one program where whole rows fit, and as many of the teacher
MAX_TILE_CLASSES = 4096  # longer rows are read in pieces
DEPTH = 2  # 16-byte loads of each thread and tensor at a time
LONG_WARPS = 8
BACKWARD_BLOCK = 4096  # logits of one program: 16 for each thread of 8 warps, from two tensors
MAX_ROWS = 256

UNSPECIALISED = ("samples", "class_groups", "programs", "chunks")


@triton.jit
def _shift(maximum):
    """log-sum-exp subtracts the maximum unless that is infinite: inf - inf is NaN, but the sum is inf or 0."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def _weights(weights_ptr, share, row, inside, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        return tl.load(weights_ptr + row, mask=inside, other=0.0)
    else:
        return tl.where(inside, share, 0.0)


@triton.jit
def _terms(power, teacher, logit):
    """e^teacher (teacher - logit); no probability for the teacher: nothing, also where the logit is -inf, too."""
    return tl.where(power == 0.0, 0.0, power * (teacher - logit))


@triton.jit
def _store_rows(
    row, inside, counted, sum_x, sum_y, cross, shift_x, shift_y, samples, inverse, square, losses_ptr, lse_ptr
):  # fmt: skip
    """losses and both log-sum-exps, from sums relative to the shifts."""
    log_x, log_y = tl.log(sum_x), tl.log(sum_y)
    loss = ((cross / sum_y - log_y) + log_x) * square
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0), mask=inside)
    tl.store(lse_ptr + row, tl.where(counted, shift_x * inverse + log_x, 0.0), mask=inside)
    tl.store(lse_ptr + samples + row, tl.where(counted, shift_y * inverse + log_y, 0.0), mask=inside)


@triton.jit
def _finish(losses_ptr, weights_ptr, loss_ptr, share, samples, WEIGHTED: tl.constexpr):
    """sum_i w_i l_i, by one program."""
    tl.debug_barrier()  # this program's own losses, written in another layout
    lane = tl.arange(0, common.FINISH_BLOCK)
    total = tl.zeros([common.FINISH_BLOCK], tl.float64)
    for start in range(0, samples, common.FINISH_BLOCK):
        row = start + lane
        loss = tl.load(losses_ptr + row, mask=row < samples, other=0.0, cache_modifier=".cg")
        weight = _weights(weights_ptr, share, row, row < samples, WEIGHTED)
        total += loss.to(tl.float64) * weight.to(tl.float64)
    tl.store(loss_ptr, tl.sum(total).to(tl.float32))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _soft_target_kl_fwd_kernel(
    logits_ptr,  # [samples, classes]
    teacher_ptr,  # [samples, classes]
    weights_ptr,  # fp32 [samples], only with WEIGHTED
    losses_ptr,  # fp32 [samples]
    lse_ptr,  # fp32 [2, samples]
    loss_ptr,  # fp32 []
    counter_ptr,  # int32 [1], unused by one program
    samples,
    class_groups,  # classes / ALIGN
    programs,
    share,  # the weight of each row without WEIGHTED
    inverse,  # 1 / temperature
    square,  # temperature^2
    ALIGN: tl.constexpr,  # divides classes, so that the compiler may load so many logits at once
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= classes
    WEIGHTED: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
):
    """ROWS whole rows."""
    classes = class_groups * ALIGN
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < samples
    counted = _weights(weights_ptr, share, row, inside, WEIGHTED) != 0.0
    at = tl.arange(0, ROWS)[:, None] * classes + column[None, :]
    mask = counted[:, None] & (column < classes)[None, :]
    x = tl.load(logits_ptr + first * classes + at, mask=mask, other=float("-inf")).to(tl.float32)
    y = tl.load(teacher_ptr + first * classes + at, mask=mask, other=float("-inf")).to(tl.float32)
    shift_x, shift_y = _shift(tl.max(x, 1)), _shift(tl.max(y, 1))
    b = (x - shift_x[:, None]) * inverse
    a = (y - shift_y[:, None]) * inverse
    power = tl.exp(a)
    _store_rows(
        row, inside, counted, tl.sum(tl.exp(b), 1), tl.sum(power, 1), tl.sum(_terms(power, a, b), 1), shift_x, shift_y,
        samples, inverse, square, losses_ptr, lse_ptr,
    )  # fmt: skip
    if ONE_PROGRAM:
        _finish(losses_ptr, weights_ptr, loss_ptr, share, samples, WEIGHTED)
    elif arrived_last(counter_ptr, programs):
        _finish(losses_ptr, weights_ptr, loss_ptr, share, samples, WEIGHTED)
        tl.store(counter_ptr, 0)


@triton.jit
def _rescale(sum_x, sum_y, cross, old_x, old_y, new_x, new_y, inverse):
    """Sums so far, now relative to larger maxima; equal first: -inf - -inf is NaN, and what is there stays as it is."""
    by_x = (_shift(old_x) - _shift(new_x)) * inverse
    by_y = (_shift(old_y) - _shift(new_y)) * inverse
    factor = tl.where(old_y == new_y, 1.0, tl.exp((old_y - new_y) * inverse))
    cross = (cross + sum_y * (by_y - by_x)) * factor  # each difference in it changes by as much
    return sum_x * tl.where(old_x == new_x, 1.0, tl.exp((old_x - new_x) * inverse)), sum_y * factor, cross


@triton.jit(do_not_specialize=UNSPECIALISED)
def _soft_target_kl_long_fwd_kernel(
    logits_ptr,  # [samples, classes]
    teacher_ptr,  # [samples, classes]
    weights_ptr,  # fp32 [samples], only with WEIGHTED
    losses_ptr,  # fp32 [samples]
    lse_ptr,  # fp32 [2, samples]
    loss_ptr,  # fp32 []
    counter_ptr,  # int32 [1]
    samples,
    class_groups,
    programs,
    share,
    inverse,
    square,
    ALIGN: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """One row, in pieces [DEPTH, LANES], with running maxima and sums in each lane, which is one thread's."""
    row = tl.program_id(0).to(tl.int64)
    counted = _weights(weights_ptr, share, row, row < samples, WEIGHTED) != 0.0
    classes = class_groups * ALIGN
    wanted = tl.where(counted, classes, 0)
    logits_ptr += row * classes
    teacher_ptr += row * classes
    offset = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top_x = tl.full([LANES], float("-inf"), tl.float32)
    top_y = top_x
    sum_x = tl.zeros([LANES], tl.float32)
    sum_y, cross = sum_x, sum_x
    for start in range(0, wanted, DEPTH * LANES):
        column = start + offset
        x = tl.load(logits_ptr + column, mask=column < classes, other=float("-inf")).to(tl.float32)
        y = tl.load(teacher_ptr + column, mask=column < classes, other=float("-inf")).to(tl.float32)
        new_x, new_y = tl.maximum(top_x, tl.max(x, 0)), tl.maximum(top_y, tl.max(y, 0))
        sum_x, sum_y, cross = _rescale(sum_x, sum_y, cross, top_x, top_y, new_x, new_y, inverse)
        b = (x - _shift(new_x)[None, :]) * inverse
        a = (y - _shift(new_y)[None, :]) * inverse
        power = tl.exp(a)
        sum_x += tl.sum(tl.exp(b), 0)
        sum_y += tl.sum(power, 0)
        cross += tl.sum(_terms(power, a, b), 0)
        top_x, top_y = new_x, new_y
    most_x, most_y = tl.max(top_x, 0), tl.max(top_y, 0)
    sum_x, sum_y, cross = _rescale(sum_x, sum_y, cross, top_x, top_y, most_x, most_y, inverse)
    _store_rows(
        row, row < samples, counted, tl.sum(sum_x, 0), tl.sum(sum_y, 0), tl.sum(cross, 0), _shift(most_x),
        _shift(most_y), samples, inverse, square, losses_ptr, lse_ptr,
    )  # fmt: skip
    if arrived_last(counter_ptr, programs):
        _finish(losses_ptr, weights_ptr, loss_ptr, share, samples, WEIGHTED)
        tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _soft_target_kl_bwd_kernel(
    grad_ptr,  # fp32 [1], upstream
    logits_ptr,  # [samples, classes]
    teacher_ptr,  # [samples, classes]
    weights_ptr,  # fp32 [samples], only with WEIGHTED
    lse_ptr,  # fp32 [2, samples]
    gradient_ptr,  # [samples, classes]
    samples,
    class_groups,
    chunks,  # programs that share a row
    share,
    inverse,
    temperature,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Gradient of a tile [ROWS, BLOCK]; rows of weight 0 are written 0 and not read."""
    classes = class_groups * ALIGN
    program = tl.program_id(0)
    first_row = (program // chunks).to(tl.int64) * ROWS
    first_column = (program % chunks) * BLOCK
    row = first_row + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = row < samples
    weight = _weights(weights_ptr, share, row, inside, WEIGHTED)
    counted = weight != 0.0
    scale = weight * temperature * tl.load(grad_ptr).to(tl.float32)
    lse_x = tl.load(lse_ptr + row, mask=counted, other=0.0)
    lse_y = tl.load(lse_ptr + samples + row, mask=counted, other=0.0)
    start = first_row * classes + first_column  # 64 bits; what is added to it fits 32
    at = tl.arange(0, ROWS)[:, None] * classes + lane[None, :]
    written = inside[:, None] & (lane < classes - first_column)[None, :]
    read = written & counted[:, None]
    x = tl.load(logits_ptr + start + at, mask=read, other=0.0).to(tl.float32)
    y = tl.load(teacher_ptr + start + at, mask=read, other=0.0).to(tl.float32)
    delta = tl.exp(x * inverse - lse_x[:, None]) - tl.exp(y * inverse - lse_y[:, None])
    gradient = tl.where(counted[:, None], delta * scale[:, None], 0.0)
    tl.store(gradient_ptr + start + at, gradient.to(gradient_ptr.dtype.element_ty), mask=written)


def soft_target_kl(
    logits: Tensor, teacher_logits: Tensor, weights: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches ``sfron_fast::soft_target_kl``: the op's arguments and outputs, already checked."""
    samples, classes = logits.shape
    logits, teacher_logits = logits.contiguous(), teacher_logits.contiguous()
    loss, losses, lse = (
        torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in ((), (samples,), (2, samples))
    )
    if samples == 0:
        return loss.zero_(), losses, lse
    weighted, weights = weights is not None, losses if weights is None else weights.contiguous()
    align, counter = common.alignment(classes), common.arrival_counter(logits)
    tensors = (logits, teacher_logits, weights, losses, lse, loss, counter, samples, classes // align)
    numbers = (1.0 / samples, 1.0 / temperature, temperature**2)
    with common.on_device(logits):
        if classes <= MAX_TILE_CLASSES:
            block, rows = tile(samples, classes, TILE)
            programs = triton.cdiv(samples, rows)
            _soft_target_kl_fwd_kernel[(programs,)](
                *tensors, programs, *numbers, ALIGN=align, ROWS=rows, BLOCK=block, WEIGHTED=weighted,
                ONE_PROGRAM=programs == 1, num_warps=4 if block <= 2048 else 8, **common.STRICT,
            )  # fmt: skip
        else:
            _soft_target_kl_long_fwd_kernel[(samples,)](
                *tensors, samples, *numbers, ALIGN=align, DEPTH=DEPTH, LANES=lanes(logits.dtype), WEIGHTED=weighted,
                num_warps=LONG_WARPS, **common.STRICT,
            )  # fmt: skip
    return loss, losses, lse


def soft_target_kl_backward(
    grad: Tensor, logits: Tensor, teacher_logits: Tensor, weights: Tensor | None, lse: Tensor, temperature: float
) -> Tensor:
    """Launches ``sfron_fast::soft_target_kl_backward``: the op's arguments and output, already checked."""
    samples, classes = logits.shape
    logits, teacher_logits, lse = logits.contiguous(), teacher_logits.contiguous(), lse.contiguous()
    gradient = torch.empty_like(logits)
    if samples == 0:
        return gradient
    weighted, weights = weights is not None, lse if weights is None else weights.contiguous()
    block, rows = tile(samples, min(classes, BACKWARD_BLOCK), BACKWARD_BLOCK)
    chunks, align = triton.cdiv(classes, block), common.alignment(classes)
    with common.on_device(logits):
        _soft_target_kl_bwd_kernel[(triton.cdiv(samples, rows) * chunks,)](
            grad, logits, teacher_logits, weights, lse, gradient, samples, classes // align, chunks, 1.0 / samples,
            1.0 / temperature, temperature, ALIGN=align, ROWS=rows, BLOCK=block, WEIGHTED=weighted, num_warps=8,
            **common.STRICT,
        )  # fmt: skip
    return gradient


def tile(samples: int, classes: int, size: int) -> tuple[int, int]:
    """(columns, rows) of a tile of about ``size`` elements that spans ``classes``."""
    block = common.power_of_two(classes)
    return block, min(max(size // block, 1), MAX_ROWS, common.power_of_two(samples))


def lanes(dtype: torch.dtype) -> int:
    """A 16-byte load for each thread."""
    return 32 * LONG_WARPS * (16 // dtype.itemsize)
