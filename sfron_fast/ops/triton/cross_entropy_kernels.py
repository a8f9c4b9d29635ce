"""Forward kernel of the adaptive cross-entropy (docs/equations.md, 4), for rows that fit a program.

``adaptive_cross_entropy.py`` launches it; ``cross_entropy_long_kernels.py`` has the one for long
rows. Row offsets have 64 bits, what is added within a row 32.
"""

import triton
import triton.language as tl

from .common import (
    across,
    columns_of,
    exp,
    expm1,
    finite,
    lines,
    log1p,
    read,
    row_max,
    tile,
    write,
)
from .samples import arrived_last, base_of, finish, raw_weight

# these change from call to call: a value of 1, or one divisible by 16, must not compile a kernel of
# its own
UNSPECIALISED = ("rows", "class_groups", "programs", "ignore_index")


@triton.jit
def with_label(rest, most, picked, valid):
    """(shift, log_sum, loss) from the sum of e^(x - most) without the label's, and the label's
    logit.

    Apart, because the label of a remembered sample is the maximum: beside its e^0 the others' sum,
    which is the loss, would be rounded away.
    """
    top = tl.where(valid, finite(tl.maximum(most, picked)), most)
    sum_less_1 = rest * exp(most - top) + tl.where(valid, expm1(picked - top), -1.0)
    # 0 where the maximum is infinite
    shift = tl.where((sum_less_1 == -1.0) | (sum_less_1 == float("inf")), 0.0, top)
    shift = tl.where(sum_less_1 != sum_less_1, sum_less_1, shift)
    log_sum = log1p(sum_less_1)
    return shift, log_sum, log_sum - (picked - shift)


@triton.jit
def store_rows(
    row,
    loss,
    shift,
    log_sum,
    rows,
    inside,
    counted,
    log_sums_ptr,
    losses_ptr,
    weights_ptr,
    floor,
    ONE_TOKEN: tl.constexpr,
):
    """log_sums and losses of some rows, a loss of 0 without a label; where a row is a sample, its
    weight's base.
    """
    tl.store(log_sums_ptr + row, shift, mask=inside)
    tl.store(log_sums_ptr + rows + row, log_sum, mask=inside)
    loss = tl.where(counted, loss, 0.0)
    tl.store(losses_ptr + row, loss, mask=inside)
    if ONE_TOKEN:
        tl.store(weights_ptr + row, base_of(loss, counted, floor), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_fwd_kernel(
    logits_ptr,  # [rows, classes]
    labels_ptr,  # int64 [rows]
    log_sums_ptr,  # fp32 [2, rows]
    losses_ptr,  # fp32 [rows]
    weights_ptr,  # fp32 [rows], only with ONE_TOKEN
    loss_ptr,  # fp32 [], this and the next two only with FINISH
    normaliser_ptr,  # fp64 [], its logarithm; with GRADIENT fp32 []
    counter_ptr,  # int32 [1]
    rows,
    class_groups,  # classes / ALIGN
    ignore_index,
    programs,
    temperature_high,
    temperature_low,
    floor,
    gradient_scale,
    ALIGN: tl.constexpr,  # divides classes, so that the compiler may load so many logits at once
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,  # DEPTH * LANES >= classes
    ONE_TOKEN: tl.constexpr,
    FINISH: tl.constexpr,  # the last program does what is left to do over the samples
    # write gradient_scale * raw weight * (softmax - onehot) over the logits
    GRADIENT: tl.constexpr,
):
    """ROWS whole rows, each read once."""
    classes = class_groups * ALIGN
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row, inside, start, at, mask = tile(first_row, rows, classes, 0, DEPTH, ROWS, LANES)
    label = tl.load(labels_ptr + row, mask=inside, other=ignore_index)
    counted = label != ignore_index
    valid = counted & (label >= 0) & (label < classes)
    # a label that is no class must not be read through, and must not go unnoticed: NaN
    picked = tl.load(logits_ptr + row * classes + label, mask=valid, other=float("nan")).to(
        tl.float32
    )
    # the label's lane again, without the label: to leave it out of the sum in its place costs more
    place = tl.where(valid, label, -1).to(tl.int32)
    own = lines(place, DEPTH)
    column = columns_of(DEPTH, ROWS, 1) * LANES + own % LANES
    beside = tl.load(
        logits_ptr + lines(row * classes, DEPTH) + column,
        mask=(own >= 0) & (column != own) & (column < classes),
        other=float("-inf"),
    ).to(tl.float32)
    beside = tl.reshape(beside, [DEPTH, ROWS])
    x = read(logits_ptr + start + at, mask, float("-inf"), DEPTH)
    most = finite(row_max(x))
    power = exp(x - across(most))
    own_lane = tl.arange(0, LANES)[None, :] == tl.where(valid, place % LANES, -1)[:, None]
    rest = tl.sum(tl.where(own_lane, 0.0, tl.sum(power, 0)), 1) + tl.sum(
        exp(beside - most[None, :]), 0
    )
    shift, log_sum, loss = with_label(rest, most, picked, valid)
    store_rows(
        row,
        loss,
        shift,
        log_sum,
        rows,
        inside,
        counted,
        log_sums_ptr,
        losses_ptr,
        weights_ptr,
        floor,
        ONE_TOKEN,
    )
    if GRADIENT:
        kind = logits_ptr.dtype.element_ty
        scale = (
            raw_weight(base_of(loss, counted, floor), temperature_high, temperature_low)
            * gradient_scale
        )
        scale = tl.where(valid, scale, float("nan"))
        gradient = power * across(exp(most - shift) * (exp(-log_sum) * scale))
        tl.debug_barrier()  # another warp may still have to read the label's logit
        write(logits_ptr + start + at, tl.where(across(counted), gradient, 0.0), mask)
        tl.debug_barrier()  # the label's element comes last, from another thread
        tl.store(logits_ptr + row * classes + label, (expm1(-loss) * scale).to(kind), mask=valid)
    if FINISH:  # noqa: SIM102 - `and` would turn the compile-time branch into one at run time
        if arrived_last(counter_ptr, programs):
            finish(
                losses_ptr,
                weights_ptr,
                loss_ptr,
                normaliser_ptr,
                rows,
                temperature_high,
                temperature_low,
                GRADIENT,
                gradient_scale,
            )
            tl.store(counter_ptr, 0)
