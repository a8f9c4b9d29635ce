"""Adaptive squared error: a few large samples and many small ones alike, forward in one launch, backward in one.

A program takes ROWS samples, or one of ``chunks`` parts of a large sample. The last program to arrive adds up
the parts in a fixed order; no float atomics, so results are repeatable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import arrived_last, finish, raw_weight

BLOCK = 4096  # elements of a program at a time: 16 for each thread of 8 warps, from two tensors
WARPS = 8
MAX_ROWS = 256
PROGRAMS = 2048  # parts of large samples: enough to fill any GPU, few enough for one program to add up

UNSPECIALISED = ("samples", "element_groups", "chunks", "steps", "programs")


@triton.jit
def _join(
    partials_ptr, losses_ptr, weights_ptr, samples, chunks, divisor, temperature_high, temperature_low, floor,
    SAMPLES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """partials [samples, chunks] -> losses and raw weights [samples], SAMPLES at a time."""
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        total = tl.zeros([SAMPLES, CHUNKS], tl.float64)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS)
            mask = (sample < samples)[:, None] & (chunk < chunks)[None, :]
            at = sample[:, None] * chunks + chunk[None, :]
            total += tl.load(partials_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
        loss = tl.div_rn(tl.sum(total, 1).to(tl.float32), divisor)
        tl.store(losses_ptr + sample, loss, mask=sample < samples)
        raw = raw_weight(loss, temperature_high, temperature_low, floor)
        tl.store(weights_ptr + sample, raw, mask=sample < samples)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _adaptive_mse_fwd_kernel(
    prediction_ptr,  # [samples, elements]
    target_ptr,  # [samples, elements]
    partials_ptr,  # fp32 [samples, chunks], only with SPLIT
    losses_ptr,  # fp32 [samples]
    weights_ptr,  # fp32 [samples]
    loss_ptr,  # fp32 []
    normaliser_ptr,  # fp32 []
    counter_ptr,  # int32 [1], unused by one program
    samples,
    element_groups,  # elements / ALIGN
    chunks,  # programs that share a sample
    steps,  # blocks a program takes
    programs,
    divisor,  # elements, or 1 for a sum
    temperature_high,
    temperature_low,
    floor,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,  # chunks > 1; then ROWS = 1
    JOINED_SAMPLES: tl.constexpr,
    JOINED_CHUNKS: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
):
    elements = element_groups * ALIGN
    program = tl.program_id(0)
    first_sample = (program // chunks).to(tl.int64) * ROWS
    first_element = (program % chunks).to(tl.int64) * steps * BLOCK
    sample = first_sample + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = sample < samples
    start = first_sample * elements + first_element  # 64 bits; what is added to it fits 32
    at = tl.arange(0, ROWS)[:, None] * elements + lane[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(steps):
        left = tl.minimum(elements - (first_element + step * BLOCK), BLOCK).to(tl.int32)
        mask = inside[:, None] & (lane < left)[None, :]
        difference = tl.load(prediction_ptr + (start + step * BLOCK) + at, mask=mask, other=0.0).to(tl.float32)
        difference -= tl.load(target_ptr + (start + step * BLOCK) + at, mask=mask, other=0.0).to(tl.float32)
        total += difference * difference
    sums = tl.sum(total, 1)
    if SPLIT:
        tl.store(partials_ptr + sample * chunks + program % chunks, sums, mask=inside)
    else:
        loss = tl.div_rn(sums, divisor)
        tl.store(losses_ptr + sample, loss, mask=inside)
        tl.store(weights_ptr + sample, raw_weight(loss, temperature_high, temperature_low, floor), mask=inside)
    if ONE_PROGRAM:
        finish(losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, samples, False, False, 1.0)
    elif arrived_last(counter_ptr, programs):
        if SPLIT:
            _join(
                partials_ptr, losses_ptr, weights_ptr, samples, chunks, divisor, temperature_high, temperature_low,
                floor, JOINED_SAMPLES, JOINED_CHUNKS,
            )  # fmt: skip
        finish(losses_ptr, weights_ptr, loss_ptr, normaliser_ptr, samples, False, False, 1.0)
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    elements = element_groups * ALIGN
    program = tl.program_id(0)
    first_sample = (program // chunks).to(tl.int64) * ROWS
    first_element = (program % chunks).to(tl.int64) * BLOCK
    sample = first_sample + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = sample < samples
    start = first_sample * elements + first_element  # 64 bits; what is added to it fits 32
    at = tl.arange(0, ROWS)[:, None] * elements + lane[None, :]
    mask = inside[:, None] & (lane < tl.minimum(elements - first_element, BLOCK).to(tl.int32))[None, :]
    difference = tl.load(prediction_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    difference -= tl.load(target_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weights_ptr + sample, mask=inside, other=0.0) * factor * tl.load(grad_ptr).to(tl.float32)
    gradient = difference * scale[:, None]
    tl.store(gradient_ptr + start + at, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


def adaptive_mse(
    prediction: Tensor, target: Tensor, temperature: float, floor: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches ``sfron_fast::adaptive_mse``: the op's arguments and outputs, already checked."""
    samples, elements = prediction.shape
    prediction, target = prediction.contiguous(), target.contiguous()
    loss, losses, weights, normaliser = common.sample_outputs(prediction, samples)
    if samples == 0:
        return loss.zero_(), losses, weights, normaliser.zero_()
    block, rows, chunks, steps = partition(samples, elements)
    partials = prediction.new_empty((samples, chunks), dtype=torch.float32) if chunks > 1 else losses
    programs = triton.cdiv(samples, rows) * chunks
    joined = min(common.power_of_two(chunks), 1024)
    align = common.alignment(elements)
    with common.on_device(prediction):
        _adaptive_mse_fwd_kernel[(programs,)](
            prediction, target, partials, losses, weights, loss, normaliser, common.arrival_counter(prediction),
            samples, elements // align, chunks, steps, programs, float(max(elements, 1) if mean else 1),
            *common.split(temperature), floor, ALIGN=align, ROWS=rows, BLOCK=block, SPLIT=chunks > 1,
            JOINED_SAMPLES=1024 // joined, JOINED_CHUNKS=joined, ONE_PROGRAM=programs == 1, num_warps=WARPS,
            **common.STRICT,
        )  # fmt: skip
    return loss, losses, weights, normaliser


def adaptive_mse_backward(grad: Tensor, prediction: Tensor, target: Tensor, weights: Tensor, mean: bool) -> Tensor:
    """Launches ``sfron_fast::adaptive_mse_backward``: the op's arguments and output, already checked."""
    samples, elements = prediction.shape
    prediction, target, weights = prediction.contiguous(), target.contiguous(), weights.contiguous()
    gradient = torch.empty_like(prediction)
    if gradient.numel() == 0:
        return gradient
    block, rows, *_ = partition(samples, elements)
    chunks, align = triton.cdiv(elements, block), common.alignment(elements)
    with common.on_device(prediction):
        _adaptive_mse_bwd_kernel[(triton.cdiv(samples, rows) * chunks,)](
            grad, prediction, target, weights, gradient, samples, elements // align, chunks,
            2.0 / elements if mean else 2.0, ALIGN=align, ROWS=rows, BLOCK=block, num_warps=WARPS, **common.STRICT,
        )  # fmt: skip
    return gradient


def partition(samples: int, elements: int) -> tuple[int, int, int, int]:
    """(columns and rows of a tile, programs for each row, tiles for each program)."""
    block = min(common.power_of_two(elements), BLOCK)
    rows = min(BLOCK // block, MAX_ROWS, common.power_of_two(samples))
    tiles = max(triton.cdiv(elements, block), 1)
    steps = triton.cdiv(tiles, max(min(tiles, PROGRAMS // samples), 1))
    return block, rows, triton.cdiv(tiles, steps), steps
