"""Kernels of the adaptive cross-entropy over tokens, and of its gradient;
``adaptive_cross_entropy.py`` launches them.

Row offsets have 64 bits, what is added within a row 32. Arithmetic is fp32, sums over tokens fp64.
"""

import triton
import triton.language as tl

from .common import (
    across,
    aligned_start,
    columns_of,
    edges,
    exp,
    expm1,
    interior,
    lines,
    part_of,
    read,
    tile,
    write,
)
from .samples import arrived_last, base_of, finish

# these change from call to call: a value of 1, or one divisible by 16, must not compile a kernel of
# its own
UNSPECIALISED = (
    "rows",
    "class_groups",
    "samples",
    "tokens",
    "ignore_index",
    "chunks",
    "groups",
    "steps",
)


@triton.jit
def _sample_mean(
    row_losses_ptr,
    labels_ptr,
    sample,
    tokens,
    ignore_index,
    LOSSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of one sample's token losses in a fixed order (0 without LOSSES), and how many tokens
    have a label.
    """
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tokens, BLOCK):
        token = start + lane
        at = sample * tokens + token
        label = tl.load(labels_ptr + at, mask=token < tokens, other=ignore_index)
        count += (label != ignore_index).to(tl.int32)
        if LOSSES:
            total += tl.load(row_losses_ptr + at, mask=token < tokens, other=0.0).to(tl.float64)
    return tl.sum(total), tl.sum(count)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_samples_fwd_kernel(
    row_losses_ptr,  # fp32 [samples, tokens], 0 without a label
    labels_ptr,  # int64 [samples, tokens]
    losses_ptr,  # fp32 [samples]
    weights_ptr,  # fp32 [samples]
    loss_ptr,  # fp32 []
    normaliser_ptr,  # fp64 [], its logarithm
    counter_ptr,  # int32 [1]
    samples,
    tokens,
    ignore_index,
    temperature_high,
    temperature_low,
    floor,
    BLOCK: tl.constexpr,
    FINISH: tl.constexpr,
):
    """The mean of one sample's tokens, the base of its weight; with FINISH the last program does
    the rest.
    """
    sample = tl.program_id(0).to(tl.int64)
    total, count = _sample_mean(
        row_losses_ptr, labels_ptr, sample, tokens, ignore_index, True, BLOCK
    )
    loss = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    tl.store(losses_ptr + sample, loss)
    tl.store(weights_ptr + sample, base_of(loss, count > 0, floor))
    if FINISH:  # noqa: SIM102
        if arrived_last(counter_ptr, samples):
            finish(
                losses_ptr,
                weights_ptr,
                loss_ptr,
                normaliser_ptr,
                samples,
                temperature_high,
                temperature_low,
                False,
                1.0,
            )
            tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_samples_bwd_kernel(
    labels_ptr,  # int64 [samples, tokens]
    weights_ptr,  # fp32 [samples]
    scale_ptr,  # fp32 [samples, tokens]: weight / labelled tokens
    tokens,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Of each token, so that the rows need no division to find their sample."""
    sample = tl.program_id(0).to(tl.int64)
    _, count = _sample_mean(labels_ptr, labels_ptr, sample, tokens, ignore_index, False, BLOCK)
    weight = tl.load(weights_ptr + sample)
    scale = tl.div_rn(weight, tl.maximum(count, 1).to(tl.float32))
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(
            scale_ptr + sample * tokens + token,
            tl.full([BLOCK], 0.0, tl.float32) + scale,
            mask=token < tokens,
        )


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_bwd_kernel(
    grad_ptr,  # fp32 [1], upstream
    logits_ptr,  # [rows, classes]
    labels_ptr,  # int64 [rows]
    scale_ptr,  # fp32 [rows]
    log_sums_ptr,  # fp32 [2, rows]
    gradient_ptr,  # [rows, classes], may be logits_ptr
    rows,
    class_groups,  # classes / ALIGN
    ignore_index,
    chunks,  # programs that share a row
    ALIGN: tl.constexpr,
    # 0, or the elements of an access, to which the rows are not aligned; then ROWS = 1
    PEEL: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradient of a tile; rows without a label are written 0 and not read."""
    classes = class_groups * ALIGN
    kind = gradient_ptr.dtype.element_ty
    chunk, first_row = part_of(chunks, ROWS)
    first_column = chunk * (DEPTH * LANES)
    row, inside, start, at, mask = tile(first_row, rows, classes, first_column, DEPTH, ROWS, LANES)
    label = tl.load(labels_ptr + row, mask=inside, other=ignore_index)
    counted = label != ignore_index
    valid = counted & (label >= 0) & (label < classes)
    scale = tl.load(scale_ptr + row, mask=counted, other=0.0) * tl.load(grad_ptr).to(tl.float32)
    scale = tl.where(counted & (valid == 0), float("nan"), scale)  # no class: NaN, as its loss
    shift = tl.load(log_sums_ptr + row, mask=counted, other=0.0)
    log_sum = tl.load(log_sums_ptr + rows + row, mask=counted, other=0.0)
    factor = exp(-log_sum) * scale
    place = tl.where(valid, label, -1)
    if PEEL:
        head, columns = interior(first_row, classes, PEEL)
        edge, edge_mask = edges(tl.arange(0, 2 * PEEL), head, columns, classes, PEEL)
        edge_mask &= chunk == 0
        first = tl.load(
            logits_ptr + first_row * classes + edge, mask=edge_mask, other=float("-inf")
        ).to(tl.float32)
        start = aligned_start(first_row, classes, PEEL) + first_column
        mask = columns_of(DEPTH, ROWS, LANES) < columns - first_column
        in_edge = (place >= 0) & ((place < head) | (place >= head + columns))
        place = tl.where(
            in_edge, tl.where(chunk == 0, first_column, -1), tl.where(place >= 0, place - head, -1)
        )
    here = (place >= first_column) & (place < first_column + DEPTH * LANES)
    picked = tl.load(logits_ptr + row * classes + label, mask=here, other=0.0).to(tl.float32)
    x = read(logits_ptr + start + at, mask & lines(counted, DEPTH), float("-inf"), DEPTH)
    gradient = exp(x - across(shift)) * across(factor)
    tl.debug_barrier()  # the label's logit may be overwritten from here on
    write(gradient_ptr + start + at, gradient, mask)
    if PEEL:
        first = tl.where(counted, exp(first - shift) * factor, 0.0)
        tl.store(gradient_ptr + first_row * classes + edge, first.to(kind), mask=edge_mask)
    tl.debug_barrier()  # the label's element comes last, from another thread
    loss = log_sum - (picked - shift)
    tl.store(gradient_ptr + row * classes + label, (expm1(-loss) * scale).to(kind), mask=here)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_scale_kernel(
    gradient_ptr,  # [elements]
    factor_ptr,  # fp32 [1]
    groups,  # elements / ALIGN
    steps,  # blocks a program takes
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient *= factor.

    Where that is 1, as where a backward pass starts, nothing is read; only here is it known.
    """
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * steps * BLOCK
        left = groups.to(tl.int64) * ALIGN - first  # 64 bits
        for step in range(steps):
            at = step * BLOCK + tl.arange(0, BLOCK)
            inside = at < left
            x = tl.load(gradient_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                gradient_ptr + first + at,
                (x * factor).to(gradient_ptr.dtype.element_ty),
                mask=inside,
            )
