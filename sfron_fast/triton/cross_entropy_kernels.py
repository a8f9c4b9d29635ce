"""Kernels of the adaptive cross-entropy (README equation 7); ``adaptive_cross_entropy.py`` launches them.

Row offsets have 64 bits, what is added within a row 32. Arithmetic is fp32, sums over tokens and samples fp64.
"""

import triton
import triton.language as tl

from .common import arrived_last, finish, raw_weight

# these change from call to call: a value of 1, or one divisible by 16, must not compile a kernel of its own
UNSPECIALISED = ("rows", "class_groups", "samples", "tokens", "programs", "ignore_index", "chunks", "groups", "steps")


@triton.jit
def _store_rows(
    row, losses, lse, inside, lse_ptr, losses_ptr, weights_ptr, counted, temperature_high, temperature_low, floor,
    ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """lse and losses of some rows, 0 where there is no label; where a row is a sample, its raw weight, returned too."""
    tl.store(lse_ptr + row, lse, mask=inside)
    losses = tl.where(counted, losses, 0.0)
    tl.store(losses_ptr + row, losses, mask=inside)
    raw = losses
    if ONE_TOKEN:
        raw = tl.where(counted, raw_weight(losses, temperature_high, temperature_low, floor), 0.0)
        tl.store(weights_ptr + row, raw, mask=inside)
    return raw


@triton.jit
def _shift(maximum):
    """log-sum-exp subtracts the maximum unless that is infinite: inf - inf is NaN, but the sum is inf or 0."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_fwd_kernel(
    logits_ptr,  # [rows, classes]
    labels_ptr,  # int64 [rows]
    lse_ptr,  # fp32 [rows]
    losses_ptr,  # fp32 [rows]
    weights_ptr,  # fp32 [rows]; this and the next three only with ONE_TOKEN
    loss_ptr,  # fp32 []; with GRADIENT gradient_scale * sum of raw weight * loss
    normaliser_ptr,  # fp32 []
    counter_ptr,  # int32 [1], unused by one program
    rows,
    class_groups,  # classes / ALIGN
    ignore_index,
    programs,
    temperature_high,
    temperature_low,
    floor,
    gradient_scale,
    ALIGN: tl.constexpr,  # divides classes, so that the compiler may load so many logits at once
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= classes
    ONE_TOKEN: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
    GRADIENT: tl.constexpr,  # write gradient_scale * raw weight * (softmax - onehot) over the logits
):
    """ROWS whole rows, each read once."""
    classes = class_groups * ALIGN
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < rows
    label = tl.load(labels_ptr + row, mask=inside, other=ignore_index)
    counted = label != ignore_index
    valid = counted & (label >= 0) & (label < classes)
    # a label that is no class must not be read through, and must not go unnoticed: NaN
    picked = tl.load(logits_ptr + row * classes + label, mask=valid, other=float("nan")).to(tl.float32)
    x = tl.load(
        logits_ptr + first * classes + (tl.arange(0, ROWS)[:, None] * classes + column[None, :]),
        mask=inside[:, None] & (column < classes)[None, :],
        other=float("-inf"),
    ).to(tl.float32)
    shift = _shift(tl.max(x, 1))
    power = tl.exp(x - shift[:, None])
    total = tl.sum(power, 1)
    logarithm = tl.log(total)
    raw = _store_rows(
        row, (shift - picked) + logarithm, shift + logarithm, inside, lse_ptr, losses_ptr, weights_ptr, counted,
        temperature_high, temperature_low, floor, ONE_TOKEN,
    )  # fmt: skip
    if GRADIENT:
        tl.debug_barrier()  # another warp may still have to read the label's logit
        scale = tl.where(valid, raw * gradient_scale, float("nan"))
        delta = power / total[:, None] - tl.where(column[None, :] == label[:, None], 1.0, 0.0)
        tl.store(
            logits_ptr + first * classes + (tl.arange(0, ROWS)[:, None] * classes + column[None, :]),
            tl.where(counted[:, None], delta * scale[:, None], 0.0).to(logits_ptr.dtype.element_ty),
            mask=inside[:, None] & (column < classes)[None, :],
        )
    if ONE_TOKEN:
        if ONE_PROGRAM:
            finish(losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, rows, True, GRADIENT, gradient_scale)
        elif arrived_last(counter_ptr, programs):
            finish(losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, rows, True, GRADIENT, gradient_scale)
            tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_long_fwd_kernel(
    logits_ptr,  # [rows, classes]
    labels_ptr,  # int64 [rows]
    lse_ptr,  # fp32 [rows]
    losses_ptr,  # fp32 [rows]
    weights_ptr,  # fp32 [rows]; this and the next three only with ONE_TOKEN
    loss_ptr,  # fp32 []
    normaliser_ptr,  # fp32 []
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
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    GRADIENT: tl.constexpr,  # as above; the second reading comes from L2 if few enough rows are under way
):
    """One row, in pieces [DEPTH, LANES], with a running maximum and sum in each lane.

    A lane's DEPTH logits are one thread's, so a piece costs no exchange between threads, and DEPTH + 1
    exponentials for DEPTH logits where a maximum per logit would cost two for each.
    """
    classes = class_groups * ALIGN
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    valid = counted & (label >= 0) & (label < classes)
    logits_ptr += row * classes
    picked = tl.load(logits_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
    offset = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    maximum = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, classes, DEPTH * LANES):
        column = start + offset
        if GRADIENT:  # it will be read again: keep it
            x = tl.load(
                logits_ptr + column, mask=column < classes, other=float("-inf"), eviction_policy="evict_last"
            ).to(tl.float32)
        else:
            x = tl.load(logits_ptr + column, mask=column < classes, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(x, 0))
        # equal first: -inf - -inf is NaN, and what is there stays as it is
        total *= tl.where(maximum == larger, 1.0, tl.exp(maximum - larger))
        total += tl.sum(tl.exp(x - _shift(larger)[None, :]), 0)
        maximum = larger
    largest = tl.max(maximum, 0)
    logarithm = tl.log(tl.sum(total * tl.where(maximum == largest, 1.0, tl.exp(maximum - largest)), 0))
    shift = _shift(largest)
    raw = _store_rows(
        row, (shift - picked) + logarithm, shift + logarithm, row < rows, lse_ptr, losses_ptr, weights_ptr, counted,
        temperature_high, temperature_low, floor, ONE_TOKEN,
    )  # fmt: skip
    if GRADIENT:
        tl.debug_barrier()  # another warp may still have to read the label's logit
        scale = tl.where(valid, raw * gradient_scale, float("nan"))
        scale = tl.where(counted, scale, 0.0)
        wanted = tl.where(counted, classes, 0)  # a row without a label is not read again
        for start in range(0, classes, DEPTH * LANES):
            column = start + offset
            x = tl.load(
                logits_ptr + column, mask=column < wanted, other=float("-inf"), eviction_policy="evict_first"
            ).to(tl.float32)
            delta = tl.exp((x - shift) - logarithm) - tl.where(column == label, 1.0, 0.0)
            gradient = tl.where(counted, delta * scale, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, gradient, mask=column < classes, eviction_policy="evict_first")
    if ONE_TOKEN:  # noqa: SIM102 - `and` would turn the compile-time branch into one at run time
        if arrived_last(counter_ptr, programs):
            finish(losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, rows, True, GRADIENT, gradient_scale)
            tl.store(counter_ptr, 0)


@triton.jit
def _sample_mean(row_losses_ptr, labels_ptr, sample, tokens, ignore_index, LOSSES: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of one sample's token losses in a fixed order (0 without LOSSES), and how many tokens have a label."""
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
    normaliser_ptr,  # fp32 []
    counter_ptr,  # int32 [1]
    samples,
    tokens,
    ignore_index,
    temperature_high,
    temperature_low,
    floor,
    BLOCK: tl.constexpr,
):
    """The mean of one sample's tokens, its raw weight; the last program does the rest."""
    sample = tl.program_id(0).to(tl.int64)
    total, count = _sample_mean(row_losses_ptr, labels_ptr, sample, tokens, ignore_index, True, BLOCK)
    loss = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    raw = raw_weight(loss, temperature_high, temperature_low, floor)
    tl.store(losses_ptr + sample, loss)
    tl.store(weights_ptr + sample, tl.where(count > 0, raw, 0.0))
    if arrived_last(counter_ptr, samples):
        finish(losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, samples, True, False, 1.0)
        tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_samples_bwd_kernel(
    labels_ptr,  # int64 [samples, tokens]
    weights_ptr,  # fp32 [samples]
    scale_ptr,  # fp32 [samples]: weight / labelled tokens
    tokens,
    ignore_index,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    _, count = _sample_mean(labels_ptr, labels_ptr, sample, tokens, ignore_index, False, BLOCK)
    weight = tl.load(weights_ptr + sample)
    tl.store(scale_ptr + sample, tl.div_rn(weight, tl.maximum(count, 1).to(tl.float32)))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_bwd_kernel(
    grad_ptr,  # fp32 [1], upstream
    logits_ptr,  # [rows, classes]
    labels_ptr,  # int64 [rows]
    scale_ptr,  # fp32 [samples]
    lse_ptr,  # fp32 [rows]
    gradient_ptr,  # [rows, classes]
    rows,
    class_groups,  # classes / ALIGN
    tokens,
    ignore_index,
    chunks,  # programs that share a row
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of a tile [ROWS, BLOCK]; rows without a label are written 0 and not read."""
    classes = class_groups * ALIGN
    program = tl.program_id(0)
    first_row = (program // chunks).to(tl.int64) * ROWS
    first_column = (program % chunks) * BLOCK
    row = first_row + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = row < rows
    label = tl.load(labels_ptr + row, mask=inside, other=ignore_index)
    counted = label != ignore_index
    scale = tl.load(scale_ptr + row // tokens, mask=counted, other=0.0) * tl.load(grad_ptr).to(tl.float32)
    scale = tl.where((label < 0) | (label >= classes), float("nan"), scale)  # no class: NaN, as its loss
    lse = tl.load(lse_ptr + row, mask=counted, other=0.0)
    start = first_row * classes + first_column  # 64 bits; what is added to it fits 32
    at = tl.arange(0, ROWS)[:, None] * classes + lane[None, :]
    written = inside[:, None] & (lane < classes - first_column)[None, :]
    x = tl.load(logits_ptr + start + at, mask=written & counted[:, None], other=0.0).to(tl.float32)
    here = label - first_column
    here = tl.where((here >= 0) & (here < BLOCK), here, -1).to(tl.int32)
    delta = tl.exp(x - lse[:, None]) - tl.where(lane[None, :] == here[:, None], 1.0, 0.0)
    gradient = tl.where(counted[:, None], delta * scale[:, None], 0.0)
    tl.store(gradient_ptr + start + at, gradient.to(gradient_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_cross_entropy_scale_kernel(
    gradient_ptr,  # [elements]
    factor_ptr,  # fp32 [1]
    groups,  # elements / ALIGN
    steps,  # blocks a program takes
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient *= factor. Where that is 1, as where a backward pass starts, nothing is read; only here is it known."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * steps * BLOCK
        left = groups.to(tl.int64) * ALIGN - first  # 64 bits
        for step in range(steps):
            at = step * BLOCK + tl.arange(0, BLOCK)
            inside = at < left
            x = tl.load(gradient_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(gradient_ptr + first + at, (x * factor).to(gradient_ptr.dtype.element_ty), mask=inside)
