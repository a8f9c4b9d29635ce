"""Adaptive squared error: a few large samples and many small ones alike, forward in one launch,
backward in one.

A program takes ROWS samples, or one of ``chunks`` parts of a large sample. The last program to
arrive adds up the parts in a fixed order; no float atomics, so results are repeatable.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from . import samples as finishing
from .common import across, part_of, read, row_sum, tile, write
from .many_samples import finish_many
from .samples import arrived_last, base_of, finish

BLOCK = 4096  # elements of a program at a time, from two tensors
SHARE = 16  # of a thread
WARPS = 8
# parts of large samples: enough to fill any GPU, few enough for one program to add up
PROGRAMS = 2048

UNSPECIALISED = ("samples", "element_groups", "chunks", "steps", "programs")


@triton.jit
def _join(
    partials_ptr,
    losses_ptr,
    weights_ptr,
    samples,
    chunks,
    divisor,
    floor,
    reference_ptr,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """partials [samples, chunks] -> losses, and bases of the weights [samples]; SAMPLES at once."""
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        total = tl.zeros([SAMPLES, CHUNKS], tl.float64)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS)
            mask = (sample < samples)[:, None] & (chunk < chunks)[None, :]
            at = sample[:, None] * chunks + chunk[None, :]
            total += tl.load(partials_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(
                tl.float64
            )
        loss = tl.div_rn(tl.sum(total, 1).to(tl.float32), divisor)
        tl.store(losses_ptr + sample, loss, mask=sample < samples)
        base = _base(loss, sample, sample < samples, floor, reference_ptr, RELATIVE)
        tl.store(weights_ptr + sample, base, mask=sample < samples)


@triton.jit
def _base(loss, sample, inside, floor, reference_ptr, RELATIVE: tl.constexpr):
    """What the weight is a power of. A reference that is not positive and finite is NaN."""
    if RELATIVE:
        reference = tl.load(reference_ptr + sample, mask=inside, other=1.0)
        sound = (reference > 0.0) & (reference < float("inf"))
        loss = tl.where(sound, tl.div_rn(loss, reference), float("nan"))
    return base_of(loss, inside, floor)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_mse_fwd_kernel(
    prediction_ptr,  # [samples, elements]
    target_ptr,  # [samples, elements]
    partials_ptr,  # fp32 [samples, chunks], only with SPLIT
    losses_ptr,  # fp32 [samples]
    weights_ptr,  # fp32 [samples]
    loss_ptr,  # fp32 [], this and the next two only with FINISH
    normaliser_ptr,  # fp64 [], its logarithm
    counter_ptr,  # int32 [1]
    reference_ptr,  # fp32 [samples], only with RELATIVE
    samples,
    element_groups,  # elements / ALIGN
    chunks,  # programs that share a sample
    steps,  # blocks a program takes
    programs,
    divisor,  # elements, or 1 for a sum
    temperature_high,
    temperature_low,
    floor,
    cap,
    ALIGN: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    SPLIT: tl.constexpr,  # chunks > 1; then ROWS = 1
    JOINED_SAMPLES: tl.constexpr,
    JOINED_CHUNKS: tl.constexpr,
    # the last program does what is left to do over the samples; always with SPLIT
    FINISH: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    elements = element_groups * ALIGN
    chunk, first_sample = part_of(chunks, ROWS)
    total = tl.zeros([DEPTH, ROWS, LANES], tl.float32)
    for step in range(steps):
        first_element = (chunk.to(tl.int64) * steps + step) * (DEPTH * LANES)
        _, _, start, at, mask = tile(
            first_sample, samples, elements, first_element, DEPTH, ROWS, LANES
        )
        difference = read(prediction_ptr + start + at, mask, 0.0, DEPTH)
        difference -= read(target_ptr + start + at, mask, 0.0, DEPTH)
        total += difference * difference
    sums = row_sum(total)
    sample = first_sample + tl.arange(0, ROWS)
    inside = sample < samples
    if SPLIT:
        tl.store(partials_ptr + sample * chunks + chunk, sums, mask=inside)
    else:
        loss = tl.div_rn(sums, divisor)
        tl.store(losses_ptr + sample, loss, mask=inside)
        base = _base(loss, sample, inside, floor, reference_ptr, RELATIVE)
        tl.store(weights_ptr + sample, base, mask=inside)
    if FINISH:  # noqa: SIM102 - `and` would turn the compile-time branch into one at run time
        if arrived_last(counter_ptr, programs):
            if SPLIT:
                _join(
                    partials_ptr,
                    losses_ptr,
                    weights_ptr,
                    samples,
                    chunks,
                    divisor,
                    floor,
                    reference_ptr,
                    JOINED_SAMPLES,
                    JOINED_CHUNKS,
                    RELATIVE,
                )
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
                reference_ptr,
                cap,
                RELATIVE,
            )
            tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_mse_bwd_kernel(
    grad_ptr,  # fp32 [1], upstream
    prediction_ptr,  # [samples, elements]
    target_ptr,  # [samples, elements]
    weights_ptr,  # fp32 [samples]
    gradient_ptr,  # [samples, elements]
    samples,
    element_groups,  # elements / ALIGN
    chunks,
    factor,  # 2, or 2 / elements
    ALIGN: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk, first_sample = part_of(chunks, ROWS)
    first_element = chunk.to(tl.int64) * (DEPTH * LANES)
    sample, inside, start, at, mask = tile(
        first_sample, samples, element_groups * ALIGN, first_element, DEPTH, ROWS, LANES
    )
    difference = read(prediction_ptr + start + at, mask, 0.0, DEPTH)
    difference -= read(target_ptr + start + at, mask, 0.0, DEPTH)
    scale = (
        tl.load(weights_ptr + sample, mask=inside, other=0.0)
        * factor
        * tl.load(grad_ptr).to(tl.float32)
    )
    gradient = difference * across(scale)
    write(gradient_ptr + start + at, gradient, mask)


def adaptive_mse(
    prediction: Tensor,
    target: Tensor,
    reference: Tensor | None,
    temperature: float,
    floor: float,
    mean: bool,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches ``sfron_fast::adaptive_mse``: the op's arguments and outputs, already checked."""
    samples, elements = prediction.shape
    prediction, target = prediction.contiguous(), target.contiguous()
    loss, losses, weights, normaliser = common.sample_outputs(prediction, samples)
    if samples == 0:
        return loss.zero_(), losses, weights, normaliser.fill_(-math.inf)
    (depth, rows, lanes), chunks, steps = partition(samples, elements, prediction.dtype)
    partials = (
        prediction.new_empty((samples, chunks), dtype=torch.float32) if chunks > 1 else losses
    )
    programs = triton.cdiv(samples, rows) * chunks
    joined = min(common.power_of_two(chunks), 1024)
    align, counter = common.alignment(elements), common.arrival_counter(prediction)
    few = chunks > 1 or samples <= finishing.ONE_PROGRAM_SAMPLES
    reference = None if reference is None else reference.contiguous()
    with common.on_device(prediction):
        _adaptive_mse_fwd_kernel[(programs,)](
            prediction,
            target,
            partials,
            losses,
            weights,
            loss,
            normaliser,
            counter,
            losses if reference is None else reference,
            samples,
            elements // align,
            chunks,
            steps,
            programs,
            float(max(elements, 1) if mean else 1),
            *common.split(temperature),
            floor,
            cap,
            ALIGN=align,
            DEPTH=depth,
            ROWS=rows,
            LANES=lanes,
            SPLIT=chunks > 1,
            JOINED_SAMPLES=1024 // joined,
            JOINED_CHUNKS=joined,
            FINISH=few,
            RELATIVE=reference is not None,
            num_warps=WARPS,
            **common.STRICT,
        )
        if not few:
            finish_many(
                losses, weights, loss, normaliser, counter, temperature, None, reference, cap
            )
    return loss, losses, weights, normaliser


def adaptive_mse_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, weights: Tensor, mean: bool
) -> Tensor:
    """Launches ``sfron_fast::adaptive_mse_backward``: the op's arguments and output, already
    checked.
    """
    samples, elements = prediction.shape
    prediction, target, weights = prediction.contiguous(), target.contiguous(), weights.contiguous()
    gradient = torch.empty_like(prediction)
    if gradient.numel() == 0:
        return gradient
    depth, rows, lanes = partition(samples, elements, prediction.dtype)[0]
    chunks, align = triton.cdiv(elements, depth * lanes), common.alignment(elements)
    with common.on_device(prediction):
        _adaptive_mse_bwd_kernel[(triton.cdiv(samples, rows) * chunks,)](
            grad,
            prediction,
            target,
            weights,
            gradient,
            samples,
            elements // align,
            chunks,
            2.0 / elements if mean else 2.0,
            ALIGN=align,
            DEPTH=depth,
            ROWS=rows,
            LANES=lanes,
            num_warps=WARPS,
            **common.STRICT,
        )
    return gradient


def partition(
    samples: int, elements: int, dtype: torch.dtype
) -> tuple[tuple[int, int, int], int, int]:
    """(shape of a tile, programs for each row, tiles for each program)."""
    shape = common.tile_shape(samples, min(elements, BLOCK), dtype, BLOCK, SHARE)
    tiles = max(triton.cdiv(elements, shape[0] * shape[2]), 1)
    steps = triton.cdiv(tiles, max(min(tiles, PROGRAMS // samples), 1))
    return shape, triton.cdiv(tiles, steps), steps
