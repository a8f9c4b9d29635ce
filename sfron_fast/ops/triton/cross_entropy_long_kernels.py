"""Forward kernel of the adaptive cross-entropy (docs/equations.md, 4), for long rows.

``adaptive_cross_entropy.py`` launches it. Row offsets have 64 bits, what is added within a row 32.
"""

import triton
import triton.language as tl

from .common import LARGEST, aligned_start, edges, exp, expm1, finite, interior, widen
from .cross_entropy_kernels import UNSPECIALISED, store_rows, with_label
from .samples import arrived_last, base_of, finish, raw_weight


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_long_fwd_kernel(
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
    ALIGN: tl.constexpr,
    PEEL: tl.constexpr,  # 0, or the elements of an access, to which the rows are not aligned
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,  # >= 2 PEEL
    ONE_TOKEN: tl.constexpr,
    FINISH: tl.constexpr,
    # write gradient_scale * raw weight * (softmax - onehot) over the logits; the second reading
    # comes from the caches if few enough rows are under way
    GRADIENT: tl.constexpr,
):
    """One row, in pieces [DEPTH, LANES], with a running maximum and sum in each lane.

    A lane's DEPTH logits are one thread's, so a piece costs no exchange between threads, and DEPTH
    + 1 exponentials for DEPTH logits where a maximum per logit would cost two for each.
    """
    classes = class_groups * ALIGN
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    valid = counted & (label >= 0) & (label < classes)
    row_ptr = logits_ptr + row * classes
    picked = tl.load(row_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
    lane = tl.arange(0, LANES)
    offset = tl.arange(0, DEPTH)[:, None] * LANES + lane[None, :]
    here = tl.where(valid, label, -1).to(tl.int32)
    # the elements before and behind the aligned part, one a lane; without them lanes start empty
    if PEEL:
        head, columns = interior(row, classes, PEEL)
        edge, edge_mask = edges(lane, head, columns, classes, PEEL)
        first = tl.load(row_ptr + edge, mask=edge_mask & (edge != here), other=float("-inf")).to(
            tl.float32
        )
        most = finite(first)
        rest = exp(first - most)
        here -= head
        pieces_ptr = logits_ptr + aligned_start(row, classes, PEEL)
    else:
        columns = classes
        most = tl.full([LANES], -LARGEST, tl.float32)
        rest = tl.zeros([LANES], tl.float32)
        pieces_ptr = row_ptr
    # first reading: each lane's running maximum, and its sum without the label's logit
    EVICT: tl.constexpr = "evict_last" if GRADIENT else ""  # it will be read again: keep it
    for start in range(0, columns, DEPTH * LANES):
        column = start + offset
        x = widen(
            tl.load(
                pieces_ptr + column,
                mask=column < columns,
                other=float("-inf"),
                eviction_policy=EVICT,
            )
        )
        if (here >= start) & (here < start + DEPTH * LANES):
            x = tl.where(column == here, float("-inf"), x)
        larger = tl.minimum(tl.maximum(most, tl.max(x, 0)), LARGEST)
        rest = rest * exp(most - larger) + tl.sum(exp(x - larger[None, :]), 0)
        most = larger
    # the lanes' sums, brought to the largest maximum, give the row's loss
    largest = tl.max(most, 0)
    shift, log_sum, loss = with_label(tl.sum(rest * exp(most - largest), 0), largest, picked, valid)
    store_rows(
        row,
        loss,
        shift,
        log_sum,
        rows,
        row < rows,
        counted,
        log_sums_ptr,
        losses_ptr,
        weights_ptr,
        floor,
        ONE_TOKEN,
    )
    # second reading: the gradient over the logits, the label's element apart
    if GRADIENT:
        kind = logits_ptr.dtype.element_ty
        scale = (
            raw_weight(base_of(loss, counted, floor), temperature_high, temperature_low)
            * gradient_scale
        )
        scale = tl.where(counted, tl.where(valid, scale, float("nan")), 0.0)
        factor = tl.where(counted, exp(-log_sum) * scale, 0.0)
        # a row without a label is not read again: e^(-inf - 0) * 0
        shift = tl.where(counted, shift, 0.0)
        tl.debug_barrier()  # another warp may still have to read the label's logit
        if PEEL:
            first = tl.load(row_ptr + edge, mask=edge_mask & counted, other=float("-inf")).to(
                tl.float32
            )
            tl.store(row_ptr + edge, (exp(first - shift) * factor).to(kind), mask=edge_mask)
        wanted = tl.where(counted, columns, 0)
        pieces = tl.cdiv(columns, DEPTH * LANES)
        for piece in range(0, pieces):  # backwards: what was read last is in the caches still
            column = (pieces - 1 - piece) * (DEPTH * LANES) + offset
            at = pieces_ptr + column
            x = tl.load(
                at, mask=column < wanted, other=float("-inf"), eviction_policy="evict_first"
            )
            gradient = exp(widen(x) - shift) * factor
            tl.store(at, gradient.to(kind), mask=column < columns, eviction_policy="evict_first")
        tl.debug_barrier()  # the label's element comes last, from another thread
        tl.store(row_ptr + label, (expm1(-loss) * scale).to(kind), mask=valid)
    # the last program to arrive adds the rows up
    if FINISH:  # noqa: SIM102
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
