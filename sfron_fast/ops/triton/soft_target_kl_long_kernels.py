"""Forward kernel of the soft-target KL for long rows; ``soft_target_kl.py`` launches it.

Row offsets have 64 bits, what is added within a row 32. Arithmetic is fp32, sums over samples fp64.
"""

import triton
import triton.language as tl

from .common import LARGEST, aligned_start, edges, exp2, finite, interior, widen
from .samples import arrived_last
from .soft_target_kl_kernels import UNSPECIALISED, store_rows, terms, weighted_sum, weights_of


@triton.jit
def _rescale(sum_x, sum_y, cross, mass, old_x, old_y, new_x, new_y, inverse):
    """Sums so far, now relative to larger maxima; ``mass``: of the weighted powers in ``cross``."""
    # not down to -inf: 0 * inf is NaN, where nothing has been summed
    by_x = tl.maximum((old_x - new_x) * inverse, -1e38)
    by_y = tl.maximum((old_y - new_y) * inverse, -1e38)
    factor = exp2(by_y)
    # each difference changes by as much
    cross = tl.where(factor == 0.0, 0.0, (cross + mass * (by_y - by_x)) * factor)
    return sum_x * exp2(by_x), sum_y * factor, cross, mass * factor


@triton.jit
def _one_each(x, y, k, inverse, CLASS_WEIGHTS: tl.constexpr):
    """Maxima and sums of lanes with a logit each; ``k`` only with CLASS_WEIGHTS."""
    most_x, most_y = finite(x), finite(y)
    b, a = (x - most_x) * inverse, (y - most_y) * inverse
    part = exp2(a)
    if CLASS_WEIGHTS:
        part *= k
    return most_x, most_y, exp2(b), exp2(a), terms(part, a, b), part


@triton.jit(do_not_specialize=UNSPECIALISED)
def _soft_target_kl_long_fwd_kernel(
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
    class_groups,
    programs,
    share,
    inverse,
    temperature,
    square,
    ALIGN: tl.constexpr,
    PEEL: tl.constexpr,  # 0, or the elements of an access, to which the rows are not aligned
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,  # >= 2 PEEL
    WEIGHTED: tl.constexpr,
    CLASS_BIAS: tl.constexpr,
    CLASS_WEIGHTS: tl.constexpr,
    FINISH: tl.constexpr,
):
    """One row, in pieces [DEPTH, LANES], with running maxima and sums in each lane, which is one
    thread's.
    """
    row = tl.program_id(0).to(tl.int64)
    counted = weights_of(weights_ptr, share, row, row < samples, WEIGHTED) != 0.0
    classes = class_groups * ALIGN
    lane = tl.arange(0, LANES)
    offset = tl.arange(0, DEPTH)[:, None] * LANES + lane[None, :]
    # the elements before and behind the aligned part, one a lane; without them lanes start empty
    if PEEL:
        head, columns = interior(row, classes, PEEL)
        edge, edge_mask = edges(lane, head, columns, classes, PEEL)
        edge_mask &= edge < tl.where(counted, classes, 0)
        first_x = tl.load(logits_ptr + row * classes + edge, mask=edge_mask, other=float("-inf"))
        first_y = tl.load(teacher_ptr + row * classes + edge, mask=edge_mask, other=float("-inf"))
        first_x, first_y = first_x.to(tl.float32), first_y.to(tl.float32)
        if CLASS_BIAS:
            first_bias = tl.load(bias_ptr + edge, mask=edge_mask, other=0.0)
            first_y = tl.fma(first_bias, temperature, first_y)
        k = first_x
        if CLASS_WEIGHTS:
            k = tl.load(class_weights_ptr + edge, mask=edge_mask, other=0.0)
        most_x, most_y, sum_x, sum_y, cross, mass = _one_each(
            first_x, first_y, k, inverse, CLASS_WEIGHTS
        )
        first = aligned_start(row, classes, PEEL)
    else:
        head, columns = 0, classes
        most_x = tl.full([LANES], -LARGEST, tl.float32)
        most_y = most_x
        sum_x = tl.zeros([LANES], tl.float32)
        sum_y, cross, mass = sum_x, sum_x, sum_x
        first = row * classes
    # each lane's running maxima, and its sums relative to them; a row of weight 0 is not read
    wanted = tl.where(counted, columns, 0)
    for start in range(0, wanted, DEPTH * LANES):
        column = start + offset
        x = widen(tl.load(logits_ptr + first + column, mask=column < columns, other=float("-inf")))
        y = widen(tl.load(teacher_ptr + first + column, mask=column < columns, other=float("-inf")))
        if CLASS_BIAS:
            bias = tl.load(bias_ptr + head + column, mask=column < columns, other=0.0)
            y = tl.fma(bias, temperature, y)
        new_x = finite(tl.maximum(most_x, tl.max(x, 0)))
        new_y = finite(tl.maximum(most_y, tl.max(y, 0)))
        if CLASS_WEIGHTS:
            sum_x, sum_y, cross, mass = _rescale(
                sum_x, sum_y, cross, mass, most_x, most_y, new_x, new_y, inverse
            )
        else:
            sum_x, sum_y, cross, _ = _rescale(
                sum_x, sum_y, cross, sum_y, most_x, most_y, new_x, new_y, inverse
            )
        b = (x - new_x[None, :]) * inverse
        a = (y - new_y[None, :]) * inverse
        power = exp2(a)
        sum_x += tl.sum(exp2(b), 0)
        sum_y += tl.sum(power, 0)
        if CLASS_WEIGHTS:
            power *= tl.load(class_weights_ptr + head + column, mask=column < columns, other=0.0)
            mass += tl.sum(power, 0)
        cross += tl.sum(terms(power, a, b), 0)
        most_x, most_y = new_x, new_y
    # the lanes' sums, brought to the largest maxima, give the row's divergence
    largest_x, largest_y = tl.max(most_x, 0), tl.max(most_y, 0)
    if not CLASS_WEIGHTS:
        mass = sum_y
    sum_x, sum_y, cross, mass = _rescale(
        sum_x, sum_y, cross, mass, most_x, most_y, largest_x, largest_y, inverse
    )
    store_rows(
        row,
        row < samples,
        counted,
        tl.sum(sum_x, 0),
        tl.sum(sum_y, 0),
        tl.sum(cross, 0),
        tl.sum(mass, 0),
        largest_x,
        largest_y,
        samples,
        square,
        losses_ptr,
        log_sums_ptr,
        CLASS_WEIGHTS,
    )
    if FINISH:  # noqa: SIM102
        if arrived_last(counter_ptr, programs):
            tl.debug_barrier()
            tl.store(
                loss_ptr,
                weighted_sum(losses_ptr, weights_ptr, share, 0, samples, WEIGHTED).to(tl.float32),
            )
            tl.store(counter_ptr, 0)
