"""Adaptive cross-entropy: a row's loss, its weight, and for the last program to arrive the sum of
all.

One token per sample: the whole forward pass is one launch, at any number of classes. More tokens: a
second launch takes the mean of each sample; thousands of samples: two more (``many_samples.py``).
The backward pass is one launch (two with more tokens), into fresh memory or over the logits. Each
reads the logits once. The sum is both passes in one launch, as it does without the normaliser.
Programs end in a counter, never in a float atomic, so results are repeatable.
"""

import math

import torch
import triton
from torch import Tensor

from . import common
from . import samples as finishing
from .cross_entropy_gradient_kernels import (
    _adaptive_cross_entropy_bwd_kernel,
    _adaptive_cross_entropy_samples_bwd_kernel,
    _adaptive_cross_entropy_samples_fwd_kernel,
    _adaptive_cross_entropy_scale_kernel,
)
from .cross_entropy_kernels import _adaptive_cross_entropy_fwd_kernel
from .cross_entropy_long_kernels import _adaptive_cross_entropy_long_fwd_kernel
from .many_samples import finish_many

TILE = 8192  # logits of one program where whole rows fit
# of a thread, eight 16-byte loads of bf16: what is done once for a row costs little for each
SHARE = 64
MAX_TILE_CLASSES = 8192  # longer rows are read in pieces with a running maximum
LONG_WARPS = 8
BACKWARD_BLOCK = 8192  # logits of one program
BACKWARD_SHARE = 32
SCALE_BLOCK = 4096
# enough to fill any GPU, few enough to cost nothing where there is nothing to do
SCALE_PROGRAMS = 1024
TOKEN_BLOCK = 1024


def adaptive_cross_entropy(
    logits: Tensor, labels: Tensor, temperature: float, floor: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches ``sfron_fast::adaptive_cross_entropy``: the op's arguments and outputs, already
    checked.
    """
    return _forward(
        logits.contiguous(), labels.contiguous(), temperature, floor, ignore_index, None
    )


def adaptive_cross_entropy_sum_(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    floor: float,
    ignore_index: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches ``sfron_fast::adaptive_cross_entropy_sum_``, once: the op's arguments and outputs,
    already checked.

    A row is read and written once, or read again while it is in the L2 cache.
    """
    return _forward(logits, labels.contiguous(), temperature, floor, ignore_index, scale)[:4]


def _forward(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    floor: float,
    ignore_index: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``scale`` None: the logits are only read, the first output is the loss; else the total."""
    samples, tokens, classes = logits.shape
    rows = samples * tokens
    loss, losses, weights, normaliser = common.sample_outputs(logits, samples)
    log_sums = torch.empty((2, samples, tokens), dtype=torch.float32, device=logits.device)
    one_token, gradient = tokens == 1, scale is not None
    if gradient:
        normaliser = torch.empty_like(loss)
    if rows == 0:
        normaliser.fill_(0.0 if gradient else -math.inf)
        return loss.zero_(), losses.zero_(), weights.zero_(), normaliser, log_sums
    row_losses = losses if one_token else losses.new_empty((samples, tokens))
    counter, numbers = common.arrival_counter(logits), (*common.split(temperature), floor)
    few = samples <= finishing.ONE_PROGRAM_SAMPLES
    align = common.alignment(classes)
    outputs = (
        log_sums,
        row_losses,
        weights,
        loss,
        normaliser,
        counter,
        rows,
        classes // align,
        ignore_index,
    )
    kinds = {
        "ALIGN": align,
        "ONE_TOKEN": one_token,
        "FINISH": one_token and few,
        "GRADIENT": gradient,
    }
    rest = (*numbers, 1.0 if scale is None else scale)
    with common.on_device(logits):
        # the rows: several to a program, or one by one where a row fills it
        if classes <= MAX_TILE_CLASSES:
            depth, tile_rows, lanes = common.tile_shape(rows, classes, logits.dtype, TILE, SHARE)
            programs = triton.cdiv(rows, tile_rows)
            # unsaid, some are spilled for one program more to a processor
            registers = {"maxnreg": 255} if gradient else {}
            _adaptive_cross_entropy_fwd_kernel[(programs,)](
                logits,
                labels,
                *outputs,
                programs,
                *rest,
                **kinds,
                DEPTH=depth,
                ROWS=tile_rows,
                LANES=lanes,
                num_warps=4,
                **registers,
                **common.STRICT,
            )
        else:
            options = (
                gradient_options(classes * logits.element_size())
                if gradient
                else {"num_warps": LONG_WARPS}
            )
            depth, lanes = pieces(logits.dtype, options["num_warps"])
            _adaptive_cross_entropy_long_fwd_kernel[(rows,)](
                logits,
                labels,
                *outputs,
                rows,
                *rest,
                **kinds,
                PEEL=common.peel(classes, logits.dtype),
                DEPTH=depth,
                LANES=lanes,
                **options,
                **common.STRICT,
            )
        # the tokens of each sample
        if not one_token:
            _adaptive_cross_entropy_samples_fwd_kernel[(samples,)](
                row_losses,
                labels,
                losses,
                weights,
                loss,
                normaliser,
                counter,
                samples,
                tokens,
                ignore_index,
                *numbers,
                BLOCK=TOKEN_BLOCK,
                FINISH=few,
                num_warps=4,
                **common.STRICT,
            )
        if not few:
            finish_many(losses, weights, loss, normaliser, counter, temperature, scale)
    return loss, losses, weights, normaliser, log_sums


def adaptive_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> Tensor:
    """Launches ``sfron_fast::adaptive_cross_entropy_backward``: the op's arguments and output,
    already checked.
    """
    logits = logits.contiguous()
    gradient = torch.empty_like(logits)
    _backward(grad, logits, labels, weights, log_sums, ignore_index, gradient)
    return gradient


def adaptive_cross_entropy_backward_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> None:
    """Launches ``sfron_fast::adaptive_cross_entropy_backward_``: the op's arguments, already
    checked.
    """
    _backward(grad, logits, labels, weights, log_sums, ignore_index, logits)


def _backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
    gradient: Tensor,
) -> None:
    """Every program reads its tile before it writes it, so ``gradient`` may be ``logits``."""
    samples, tokens, classes = logits.shape
    rows = samples * tokens
    if rows == 0:
        return
    labels, log_sums, weights = (t.contiguous() for t in (labels, log_sums, weights))
    with common.on_device(logits):
        scale = weights
        if tokens > 1:
            scale = weights.new_empty((samples, tokens))
            _adaptive_cross_entropy_samples_bwd_kernel[(samples,)](
                labels,
                weights,
                scale,
                tokens,
                ignore_index,
                BLOCK=TOKEN_BLOCK,
                num_warps=4,
                **common.STRICT,
            )
        align = common.alignment(classes)
        depth, tile_rows, lanes = common.tile_shape(
            rows, min(classes, BACKWARD_BLOCK), logits.dtype, BACKWARD_BLOCK, BACKWARD_SHARE
        )
        peel = common.peel(classes, logits.dtype) if classes > BACKWARD_BLOCK else 0
        chunks = triton.cdiv(classes, depth * lanes)
        _adaptive_cross_entropy_bwd_kernel[(triton.cdiv(rows, tile_rows) * chunks,)](
            grad,
            logits,
            labels,
            scale,
            log_sums,
            gradient,
            rows,
            classes // align,
            ignore_index,
            chunks,
            ALIGN=align,
            PEEL=peel,
            DEPTH=depth,
            ROWS=tile_rows,
            LANES=lanes,
            num_warps=8,
            **common.STRICT,
        )


def adaptive_cross_entropy_scale_(gradient: Tensor, factor: Tensor) -> None:
    """Launches ``sfron_fast::adaptive_cross_entropy_scale_``; the op's arguments are checked."""
    elements = gradient.numel()
    if elements == 0:
        return
    align, blocks = common.alignment(elements), triton.cdiv(elements, SCALE_BLOCK)
    programs = min(blocks, SCALE_PROGRAMS)
    with common.on_device(gradient):
        _adaptive_cross_entropy_scale_kernel[(programs,)](
            gradient,
            factor,
            elements // align,
            triton.cdiv(blocks, programs),
            ALIGN=align,
            BLOCK=SCALE_BLOCK,
            num_warps=4,
            **common.STRICT,
        )


def pieces(dtype: torch.dtype, warps: int) -> tuple[int, int]:
    """(depth, lanes): four independent 16-byte loads for each thread."""
    return 4, 32 * warps * (16 // dtype.itemsize)


def gradient_options(row_bytes: int) -> dict[str, int]:
    """Larger programs for longer rows, so that the rows under way on an H100 or H200 fit its 50 MB
    of L2.

    Up to 320 KB (152 064 classes of bf16) two programs to a processor, so that one reads from
    memory while the other is between its rows: 64 registers a thread. While one is at its first
    reading and one at its second, as much lies in L2 as one whole row for each processor, 42 MB.
    """
    if row_bytes <= 32768:
        return {"num_warps": 8}
    return {"num_warps": 16, "maxnreg": 64} if row_bytes <= 327680 else {"num_warps": 32}
