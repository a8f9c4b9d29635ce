"""Forward kernels of the soft-target KL; ``soft_target_kl.py`` launches them, and
``soft_target_kl_long_kernels.py`` has the one for long rows.

Row offsets have 64 bits, what is added within a row 32. Arithmetic is fp32, sums over samples fp64.
"""

import triton
import triton.language as tl

from .common import (
    across,
    columns_of,
    exp2,
    finite,
    lines,
    read,
    row_max,
    row_sum,
    tile,
)
from .samples import BLOCK, arrived_last

LN_2 = tl.constexpr(0.6931471805599453)

UNSPECIALISED = ("samples", "class_groups", "programs", "chunks", "group", "groups")


@triton.jit
def weights_of(weights_ptr, share, row, inside, WEIGHTED: tl.constexpr):
    """Of some rows; without WEIGHTED each has the same share."""
    if WEIGHTED:
        return tl.load(weights_ptr + row, mask=inside, other=0.0)
    else:
        return tl.where(inside, share, 0.0)


@triton.jit
def of_classes(numbers_ptr, first_column, mask, DEPTH: tl.constexpr):
    """A number of each class, beside the elements of a tile whose ``mask`` this is."""
    ROWS: tl.constexpr = mask.shape[0] // DEPTH
    column = first_column + columns_of(DEPTH, ROWS, mask.shape[1])
    return read(numbers_ptr + column, mask, 0.0, DEPTH)


@triton.jit
def terms(power, teacher, logit):
    """2^teacher (teacher - logit), times the class's weight, as ``power`` is; no probability for
    the teacher, or no weight: nothing, also where the logit is -inf, too.
    """
    return tl.where(power == 0.0, 0.0, power * (teacher - logit))


@triton.jit
def _settled(total, maximum, counted):
    """(shift, log of the sum) of a row that counts: the shift is its maximum, 0 where that is
    infinite.
    """
    shift = tl.where((total == 0.0) | (total == float("inf")), 0.0, maximum)
    shift = tl.where(total != total, total, shift)
    return tl.where(counted, shift, 0.0), tl.where(counted, tl.log(total), 0.0)


@triton.jit
def store_rows(
    row,
    inside,
    counted,
    sum_x,
    sum_y,
    cross,
    mass,
    most_x,
    most_y,
    samples,
    square,
    losses_ptr,
    log_sums_ptr,
    CLASS_WEIGHTS: tl.constexpr,
):
    """losses and log_sums, from sums relative to the maxima; ``cross`` in units of log 2."""
    shift_x, log_x = _settled(sum_x, most_x, counted)
    shift_y, log_y = _settled(sum_y, most_y, counted)
    if CLASS_WEIGHTS:
        mass = mass / sum_y
        logs = tl.where(mass == 0.0, 0.0, mass * (log_x - log_y))  # 0 times inf is NaN
        loss = (cross / sum_y * LN_2 + logs) * square
        tl.store(log_sums_ptr + 4 * samples + row, tl.where(counted, mass, 0.0), mask=inside)
    else:
        loss = ((cross / sum_y * LN_2 - log_y) + log_x) * square
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0), mask=inside)
    tl.store(log_sums_ptr + row, shift_x, mask=inside)
    tl.store(log_sums_ptr + samples + row, log_x, mask=inside)
    tl.store(log_sums_ptr + 2 * samples + row, shift_y, mask=inside)
    tl.store(log_sums_ptr + 3 * samples + row, log_y, mask=inside)


@triton.jit
def weighted_sum(losses_ptr, weights_ptr, share, first, last, WEIGHTED: tl.constexpr):
    """sum_i w_i l_i of the samples from ``first`` to ``last``, in fp64 and a fixed order."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        row = start + lane
        loss = tl.load(losses_ptr + row, mask=row < last, other=0.0, cache_modifier=".cg")
        weight = weights_of(weights_ptr, share, row, row < last, WEIGHTED)
        total += loss.to(tl.float64) * weight.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _soft_target_kl_fwd_kernel(
    logits_ptr,  # [samples, classes]
    teacher_ptr,  # [samples, classes]
    weights_ptr,  # fp32 [samples], only with WEIGHTED
    bias_ptr,  # fp32 [classes], only with CLASS_BIAS
    class_weights_ptr,  # fp32 [classes], only with CLASS_WEIGHTS
    losses_ptr,  # fp32 [samples]
    log_sums_ptr,  # fp32 [4, samples], [5, samples] with CLASS_WEIGHTS
    loss_ptr,  # fp32 [], this and the next only with FINISH
    counter_ptr,  # int32 [1]
    samples,
    class_groups,  # classes / ALIGN
    programs,
    share,  # the weight of each row without WEIGHTED
    inverse,  # log2(e) / temperature
    temperature,
    square,  # temperature^2
    ALIGN: tl.constexpr,  # divides classes, so that the compiler may load so many logits at once
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,  # DEPTH * LANES >= classes
    WEIGHTED: tl.constexpr,
    CLASS_BIAS: tl.constexpr,
    CLASS_WEIGHTS: tl.constexpr,
    FINISH: tl.constexpr,  # the last program adds up the losses
):
    """ROWS whole rows."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row, inside, start, at, mask = tile(
        first_row, samples, class_groups * ALIGN, 0, DEPTH, ROWS, LANES
    )
    counted = weights_of(weights_ptr, share, row, inside, WEIGHTED) != 0.0
    mask &= lines(counted, DEPTH)
    x = read(logits_ptr + start + at, mask, float("-inf"), DEPTH)
    y = read(teacher_ptr + start + at, mask, float("-inf"), DEPTH)
    if CLASS_BIAS:
        y = tl.fma(of_classes(bias_ptr, 0, mask, DEPTH), temperature, y)
    most_x, most_y = finite(row_max(x)), finite(row_max(y))
    b = (x - across(most_x)) * inverse
    a = (y - across(most_y)) * inverse
    power = exp2(a)
    part = power
    if CLASS_WEIGHTS:
        part = power * of_classes(class_weights_ptr, 0, mask, DEPTH)
    store_rows(
        row,
        inside,
        counted,
        row_sum(exp2(b)),
        row_sum(power),
        row_sum(terms(part, a, b)),
        row_sum(part),
        most_x,
        most_y,
        samples,
        square,
        losses_ptr,
        log_sums_ptr,
        CLASS_WEIGHTS,
    )
    if FINISH:  # noqa: SIM102 - `and` would turn the compile-time branch into one at run time
        if arrived_last(counter_ptr, programs):
            tl.debug_barrier()  # this program's own losses, written in another layout
            tl.store(
                loss_ptr,
                weighted_sum(losses_ptr, weights_ptr, share, 0, samples, WEIGHTED).to(tl.float32),
            )
            tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _soft_target_kl_sum_kernel(
    losses_ptr,  # fp32 [samples]
    weights_ptr,  # fp32 [samples], only with WEIGHTED
    partials_ptr,  # fp64 [groups]
    loss_ptr,  # fp32 []
    counter_ptr,  # int32 [1]
    samples,
    group,  # samples of a program
    groups,
    share,
    WEIGHTED: tl.constexpr,
):
    """The loss of many samples: the sum of each group; the last program to arrive adds those up."""
    first = tl.program_id(0).to(tl.int64) * group
    last = tl.minimum(first + group, samples)
    tl.store(
        partials_ptr + tl.program_id(0),
        weighted_sum(losses_ptr, weights_ptr, share, first, last, WEIGHTED),
    )
    if arrived_last(counter_ptr, groups):
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, groups, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(partials_ptr + at, mask=at < groups, other=0.0, cache_modifier=".cg")
        tl.store(loss_ptr, tl.sum(total, 0).to(tl.float32))
        tl.store(counter_ptr, 0)
