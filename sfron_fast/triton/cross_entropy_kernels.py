"""Kernels of the adaptive cross-entropy (README equation 4); ``adaptive_cross_entropy.py`` launches them.

Row offsets have 64 bits, what is added within a row 32. Arithmetic is fp32, sums over tokens and samples fp64.
"""

import triton
import triton.language as tl

from .common import (
    LARGEST,
    across,
    edges,
    exp,
    expm1,
    finite,
    interior,
    log1p,
    row_max,
    tile,
    widen,
)
from .samples import arrived_last, base_of, finish, raw_weight

# these change from call to call: a value of 1, or one divisible by 16, must not compile a kernel of its own
UNSPECIALISED = ("rows", "class_groups", "samples", "tokens", "programs", "ignore_index", "chunks", "groups", "steps")


@triton.jit
def _with_label(rest, most, picked, valid):
    """(shift, log_sum, loss) from the sum of e^(x - most) without the label's, and the label's logit.

    Apart, because the label of a remembered sample is the maximum: beside its e^0 the others' sum, which is the loss,
    would be rounded away.
    """
    top = tl.where(valid, finite(tl.maximum(most, picked)), most)
    sum_less_1 = rest * exp(most - top) + tl.where(valid, expm1(picked - top), -1.0)
    shift = tl.where((sum_less_1 == -1.0) | (sum_less_1 == float("inf")), 0.0, top)  # the maximum is infinite
    shift = tl.where(sum_less_1 != sum_less_1, sum_less_1, shift)
    log_sum = log1p(sum_less_1)
    return shift, log_sum, log_sum - (picked - shift)


@triton.jit
def _store_rows(
    row, loss, shift, log_sum, rows, inside, counted, log_sums_ptr, losses_ptr, weights_ptr, floor,
    ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """log_sums and losses of some rows, the latter 0 without a label; where a row is a sample, the base of its weight."""
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
    GRADIENT: tl.constexpr,  # write gradient_scale * raw weight * (softmax - onehot) over the logits
):
    """ROWS whole rows, each read once."""
    classes = class_groups * ALIGN
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row, inside, start, at, mask = tile(first_row, rows, classes, 0, DEPTH, ROWS, LANES)
    label = tl.load(labels_ptr + row, mask=inside, other=ignore_index)
    counted = label != ignore_index
    valid = counted & (label >= 0) & (label < classes)
    # a label that is no class must not be read through, and must not go unnoticed: NaN
    picked = tl.load(logits_ptr + row * classes + label, mask=valid, other=float("nan")).to(tl.float32)
    # the label's lane again, without the label: to leave it out of the sum in its place costs more
    place = tl.where(valid, label, -1).to(tl.int32)
    column = tl.arange(0, DEPTH)[:, None] * LANES + (place % LANES)[None, :]
    beside = tl.load(
        logits_ptr + (row * classes)[None, :] + column, other=float("-inf"),
        mask=valid[None, :] & (column != place[None, :]) & (column < classes),
    ).to(tl.float32)  # fmt: skip
    x = widen(tl.load(logits_ptr + start + at, mask=mask, other=float("-inf")))
    most = finite(row_max(x))
    power = exp(x - across(most))
    own_lane = tl.arange(0, LANES)[None, :] == tl.where(valid, place % LANES, -1)[:, None]
    rest = tl.sum(tl.where(own_lane, 0.0, tl.sum(power, 0)), 1) + tl.sum(exp(beside - most[None, :]), 0)
    shift, log_sum, loss = _with_label(rest, most, picked, valid)
    _store_rows(
        row, loss, shift, log_sum, rows, inside, counted, log_sums_ptr, losses_ptr, weights_ptr, floor, ONE_TOKEN
    )  # fmt: skip
    if GRADIENT:
        kind = logits_ptr.dtype.element_ty
        scale = raw_weight(base_of(loss, counted, floor), temperature_high, temperature_low) * gradient_scale
        scale = tl.where(valid, scale, float("nan"))
        gradient = power * across(exp(most - shift) * (exp(-log_sum) * scale))
        tl.debug_barrier()  # another warp may still have to read the label's logit
        tl.store(logits_ptr + start + at, tl.where(across(counted), gradient, 0.0).to(kind), mask=mask)
        tl.debug_barrier()  # the label's element comes last, from another thread
        tl.store(logits_ptr + row * classes + label, (expm1(-loss) * scale).to(kind), mask=valid)
    if FINISH:  # noqa: SIM102 - `and` would turn the compile-time branch into one at run time
        if arrived_last(counter_ptr, programs):
            finish(
                losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, rows, temperature_high, temperature_low, GRADIENT,
                gradient_scale,
            )  # fmt: skip
            tl.store(counter_ptr, 0)


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
    GRADIENT: tl.constexpr,  # as above; the second reading comes from the caches if few enough rows are under way
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
    row_ptr = logits_ptr + row * classes
    picked = tl.load(row_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
    lane = tl.arange(0, LANES)
    offset = tl.arange(0, DEPTH)[:, None] * LANES + lane[None, :]
    here = tl.where(valid, label, -1).to(tl.int32)
    if PEEL:
        head, columns = interior(row, classes, PEEL)
        edge, edge_mask = edges(lane, head, columns, classes, PEEL)
        first = tl.load(row_ptr + edge, mask=edge_mask & (edge != here), other=float("-inf")).to(tl.float32)
        most = finite(first)
        rest = exp(first - most)
        here -= head
        pieces_ptr = logits_ptr + (row * classes + (PEEL - 1)) // PEEL * PEEL  # row_ptr + head, seen to be aligned
    else:
        columns = classes
        most = tl.full([LANES], -LARGEST, tl.float32)
        rest = tl.zeros([LANES], tl.float32)
        pieces_ptr = row_ptr
    for start in range(0, columns, DEPTH * LANES):
        column = start + offset
        if GRADIENT:  # it will be read again: keep it
            x = tl.load(
                pieces_ptr + column, mask=column < columns, other=float("-inf"), eviction_policy="evict_last"
            )  # fmt: skip
        else:
            x = tl.load(pieces_ptr + column, mask=column < columns, other=float("-inf"))
        x = widen(x)
        if (here >= start) & (here < start + DEPTH * LANES):
            x = tl.where(column == here, float("-inf"), x)
        larger = finite(tl.maximum(most, tl.max(x, 0)))
        rest = rest * exp(most - larger) + tl.sum(exp(x - larger[None, :]), 0)
        most = larger
    largest = tl.max(most, 0)
    shift, log_sum, loss = _with_label(tl.sum(rest * exp(most - largest), 0), largest, picked, valid)
    _store_rows(
        row, loss, shift, log_sum, rows, row < rows, counted, log_sums_ptr, losses_ptr, weights_ptr, floor, ONE_TOKEN
    )  # fmt: skip
    if GRADIENT:
        kind = logits_ptr.dtype.element_ty
        scale = raw_weight(base_of(loss, counted, floor), temperature_high, temperature_low) * gradient_scale
        scale = tl.where(counted, tl.where(valid, scale, float("nan")), 0.0)
        factor = tl.where(counted, exp(-log_sum) * scale, 0.0)
        shift = tl.where(counted, shift, 0.0)  # a row without a label is not read again: e^(-inf - 0) * 0
        tl.debug_barrier()  # another warp may still have to read the label's logit
        if PEEL:
            first = tl.load(row_ptr + edge, mask=edge_mask & counted, other=float("-inf")).to(tl.float32)
            tl.store(row_ptr + edge, (exp(first - shift) * factor).to(kind), mask=edge_mask)
        wanted = tl.where(counted, columns, 0)
        pieces = tl.cdiv(columns, DEPTH * LANES)
        for piece in range(0, pieces):  # backwards: what was read last is in the caches still
            column = (pieces - 1 - piece) * (DEPTH * LANES) + offset
            x = tl.load(
                pieces_ptr + column, mask=column < wanted, other=float("-inf"), eviction_policy="evict_first"
            )  # fmt: skip
            gradient = (exp(widen(x) - shift) * factor).to(kind)
            tl.store(pieces_ptr + column, gradient, mask=column < columns, eviction_policy="evict_first")
        tl.debug_barrier()  # the label's element comes last, from another thread
        tl.store(row_ptr + label, (expm1(-loss) * scale).to(kind), mask=valid)
    if FINISH:  # noqa: SIM102
        if arrived_last(counter_ptr, programs):
            finish(
                losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, rows, temperature_high, temperature_low, GRADIENT,
                gradient_scale,
            )  # fmt: skip
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
    """The mean of one sample's tokens, the base of its weight; with FINISH the last program does the rest."""
    sample = tl.program_id(0).to(tl.int64)
    total, count = _sample_mean(row_losses_ptr, labels_ptr, sample, tokens, ignore_index, True, BLOCK)
    loss = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    tl.store(losses_ptr + sample, loss)
    tl.store(weights_ptr + sample, base_of(loss, count > 0, floor))
    if FINISH:  # noqa: SIM102
        if arrived_last(counter_ptr, samples):
            finish(
                losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, samples, temperature_high, temperature_low, False,
                1.0,
            )  # fmt: skip
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
        tl.store(scale_ptr + sample * tokens + token, tl.full([BLOCK], 0.0, tl.float32) + scale, mask=token < tokens)


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
    PEEL: tl.constexpr,  # 0, or the elements of an access, to which the rows are not aligned; then ROWS = 1
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradient of a tile; rows without a label are written 0 and not read."""
    classes = class_groups * ALIGN
    kind = gradient_ptr.dtype.element_ty
    chunk = tl.program_id(0) % chunks
    first_row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS
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
        first = tl.load(logits_ptr + first_row * classes + edge, mask=edge_mask, other=float("-inf")).to(tl.float32)
        start = (first_row * classes + (PEEL - 1)) // PEEL * PEEL + first_column
        columns_left = columns - first_column
        mask = (tl.arange(0, DEPTH)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]) < columns_left
        in_edge = (place >= 0) & ((place < head) | (place >= head + columns))
        place = tl.where(in_edge, tl.where(chunk == 0, first_column, -1), tl.where(place >= 0, place - head, -1))
    here = (place >= first_column) & (place < first_column + DEPTH * LANES)
    picked = tl.load(logits_ptr + row * classes + label, mask=here, other=0.0).to(tl.float32)
    x = widen(tl.load(logits_ptr + start + at, mask=mask & across(counted), other=float("-inf")))
    gradient = exp(x - across(shift)) * across(factor)
    tl.debug_barrier()  # the label's logit may be overwritten from here on
    tl.store(gradient_ptr + start + at, gradient.to(kind), mask=mask)
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
