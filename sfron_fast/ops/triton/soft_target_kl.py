"""KL of a teacher's softmax from the logits', row by row: forward in one launch, backward in one.

Forward reads both tensors once: whole rows, or a long row in pieces with running maxima. The last
program to arrive adds up the rows in a fixed order, thousands of them in a launch of their own; no
float atomics, so results are repeatable. Rows of weight 0 are not read.
"""

import torch
import triton
from torch import Tensor

from . import common, many_samples
from . import samples as finishing
from .soft_target_kl_gradient_kernels import _soft_target_kl_bwd_kernel
from .soft_target_kl_kernels import _soft_target_kl_fwd_kernel, _soft_target_kl_sum_kernel
from .soft_target_kl_long_kernels import _soft_target_kl_long_fwd_kernel

TILE = 4096  # logits of one program where whole rows fit, and as many of the teacher
SHARE = 32  # of a thread, from each
MAX_TILE_CLASSES = 8192  # longer rows are read in pieces
DEPTH = 4  # 16-byte loads of each thread and tensor at a time
LONG_WARPS = 8
# of a thread, by the bytes of a logit: two programs to a processor, or three
LONG_REGISTERS = {2: 128, 4: 80}
BACKWARD_BLOCK = 4096  # logits of one program
BACKWARD_SHARE = 16


def soft_target_kl(
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    class_bias: Tensor | None,
    class_weights: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches ``sfron_fast::soft_target_kl``: the op's arguments and outputs, already checked."""
    samples, classes = logits.shape
    logits, teacher_logits = logits.contiguous(), teacher_logits.contiguous()
    loss, losses, log_sums = (
        torch.empty(shape, dtype=torch.float32, device=logits.device)
        for shape in ((), (samples,), (4 if class_weights is None else 5, samples))
    )
    if samples == 0:
        return loss.zero_(), losses, log_sums
    constants, given = _constants(losses, weights, class_bias, class_weights)
    align, counter = common.alignment(classes), common.arrival_counter(logits)
    # the type of which a thread of a long row reads 16 bytes at a time: that of the logits, or,
    # beside numbers of classes, theirs: with other classes in its hands each would be exchanged
    wide = logits.dtype
    if classes > MAX_TILE_CLASSES and (given["CLASS_BIAS"] or given["CLASS_WEIGHTS"]):
        align, wide = min(align, 4), torch.float32
    few = samples <= finishing.ONE_PROGRAM_SAMPLES
    tensors = (
        logits,
        teacher_logits,
        *constants,
        losses,
        log_sums,
        loss,
        counter,
        samples,
        classes // align,
    )
    numbers = (1.0 / samples, common.LOG2_E.value / temperature, temperature, temperature**2)
    kinds = {"ALIGN": align, "FINISH": few, **given}
    with common.on_device(logits):
        if classes <= MAX_TILE_CLASSES:
            depth, rows, lanes = common.tile_shape(samples, classes, logits.dtype, TILE, SHARE)
            programs = triton.cdiv(samples, rows)
            _soft_target_kl_fwd_kernel[(programs,)](
                *tensors,
                programs,
                *numbers,
                **kinds,
                DEPTH=depth,
                ROWS=rows,
                LANES=lanes,
                num_warps=4 if depth * lanes <= 4096 else 8,
                **common.STRICT,
            )
        else:
            _soft_target_kl_long_fwd_kernel[(samples,)](
                *tensors,
                samples,
                *numbers,
                **kinds,
                PEEL=common.peel(classes, wide),
                DEPTH=DEPTH,
                LANES=lanes_of(wide),
                num_warps=LONG_WARPS,
                maxnreg=LONG_REGISTERS[wide.itemsize],
                **common.STRICT,
            )
        if not few:
            groups = triton.cdiv(samples, many_samples.GROUP)
            _soft_target_kl_sum_kernel[(groups,)](
                losses,
                constants[0],
                losses.new_empty(groups, dtype=torch.float64),
                loss,
                counter,
                samples,
                many_samples.GROUP,
                groups,
                numbers[0],
                WEIGHTED=given["WEIGHTED"],
                num_warps=4,
                **common.STRICT,
            )
    return loss, losses, log_sums


def soft_target_kl_backward(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    class_bias: Tensor | None,
    class_weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> Tensor:
    """Launches ``sfron_fast::soft_target_kl_backward``: the op's arguments and output, already
    checked.
    """
    samples, classes = logits.shape
    logits, teacher_logits, log_sums = (
        logits.contiguous(),
        teacher_logits.contiguous(),
        log_sums.contiguous(),
    )
    gradient = torch.empty_like(logits)
    if samples == 0:
        return gradient
    constants, given = _constants(log_sums, weights, class_bias, class_weights)
    depth, rows, lanes = common.tile_shape(
        samples, min(classes, BACKWARD_BLOCK), logits.dtype, BACKWARD_BLOCK, BACKWARD_SHARE
    )
    peel = common.peel(classes, logits.dtype) if classes > BACKWARD_BLOCK else 0
    chunks, align = triton.cdiv(classes, depth * lanes), common.alignment(classes)
    with common.on_device(logits):
        _soft_target_kl_bwd_kernel[(triton.cdiv(samples, rows) * chunks,)](
            grad,
            logits,
            teacher_logits,
            *constants,
            log_sums,
            gradient,
            samples,
            classes // align,
            chunks,
            1.0 / samples,
            common.LOG2_E.value / temperature,
            temperature,
            ALIGN=align,
            PEEL=peel,
            DEPTH=depth,
            ROWS=rows,
            LANES=lanes,
            **given,
            num_warps=8,
            **common.STRICT,
        )
    return gradient


def _constants(
    other: Tensor, weights: Tensor | None, class_bias: Tensor | None, class_weights: Tensor | None
) -> tuple[list[Tensor], dict[str, bool]]:
    """What is given, and what says so to a kernel; ``other`` stands for the rest."""
    named = {"WEIGHTED": weights, "CLASS_BIAS": class_bias, "CLASS_WEIGHTS": class_weights}
    tensors = [other if t is None else t.contiguous() for t in named.values()]
    return tensors, {name: t is not None for name, t in named.items()}


def lanes_of(dtype: torch.dtype) -> int:
    """A 16-byte load for each thread."""
    return 32 * LONG_WARPS * (16 // dtype.itemsize)
