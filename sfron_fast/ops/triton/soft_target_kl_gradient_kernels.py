"""The gradient of the soft-target KL; ``soft_target_kl.py`` launches it."""

import triton
import triton.language as tl

from .common import (
    across,
    aligned_start,
    columns_of,
    edges,
    exp,
    exp2,
    interior,
    lines,
    part_of,
    read,
    tile,
    write,
)
from .soft_target_kl_kernels import of_classes, weights_of

UNSPECIALISED = ("samples", "class_groups", "chunks")


@triton.jit(do_not_specialize=UNSPECIALISED)
def _soft_target_kl_bwd_kernel(
    grad_ptr,  # fp32 [1], upstream
    logits_ptr,  # [samples, classes]
    teacher_ptr,  # [samples, classes]
    weights_ptr,  # fp32 [samples], only with WEIGHTED
    bias_ptr,  # fp32 [classes], only with CLASS_BIAS
    class_weights_ptr,  # fp32 [classes], only with CLASS_WEIGHTS
    log_sums_ptr,  # fp32 [4, samples], [5, samples] with CLASS_WEIGHTS
    gradient_ptr,  # [samples, classes]
    samples,
    class_groups,
    chunks,  # programs that share a row
    share,
    inverse,  # log2(e) / temperature
    temperature,
    ALIGN: tl.constexpr,
    # 0, or the elements of an access, to which the rows are not aligned; then ROWS = 1
    PEEL: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CLASS_BIAS: tl.constexpr,
    CLASS_WEIGHTS: tl.constexpr,
):
    """Gradient of a tile; rows of weight 0 are written 0 and not read."""
    classes = class_groups * ALIGN
    kind = gradient_ptr.dtype.element_ty
    chunk, first_row = part_of(chunks, ROWS)
    first_column = chunk * (DEPTH * LANES)
    row, inside, start, at, mask = tile(
        first_row, samples, classes, first_column, DEPTH, ROWS, LANES
    )
    weight = weights_of(weights_ptr, share, row, inside, WEIGHTED)
    counted = weight != 0.0
    scale = weight * temperature * tl.load(grad_ptr).to(tl.float32)
    shift_x = tl.load(log_sums_ptr + row, mask=counted, other=0.0)
    shift_y = tl.load(log_sums_ptr + 2 * samples + row, mask=counted, other=0.0)
    scale_x = exp(-tl.load(log_sums_ptr + samples + row, mask=counted, other=0.0)) * scale
    scale_y = exp(-tl.load(log_sums_ptr + 3 * samples + row, mask=counted, other=0.0)) * scale
    if CLASS_WEIGHTS:
        scale_x *= tl.load(log_sums_ptr + 4 * samples + row, mask=counted, other=0.0)
    class_column = first_column
    if PEEL:
        head, columns = interior(first_row, classes, PEEL)
        column, edge_mask = edges(tl.arange(0, 2 * PEEL), head, columns, classes, PEEL)
        edge, edge_mask = first_row * classes + column, edge_mask & (chunk == 0)
        x = tl.load(logits_ptr + edge, mask=edge_mask & counted, other=0.0).to(tl.float32)
        y = tl.load(teacher_ptr + edge, mask=edge_mask & counted, other=0.0).to(tl.float32)
        if CLASS_BIAS:
            bias = tl.load(bias_ptr + column, mask=edge_mask, other=0.0)
            y = tl.fma(bias, temperature, y)
        target = exp2((y - shift_y) * inverse) * scale_y
        if CLASS_WEIGHTS:
            target *= tl.load(class_weights_ptr + column, mask=edge_mask, other=0.0)
        gradient = exp2((x - shift_x) * inverse) * scale_x - target
        tl.store(gradient_ptr + edge, tl.where(counted, gradient, 0.0).to(kind), mask=edge_mask)
        start = aligned_start(first_row, classes, PEEL) + first_column
        mask = columns_of(DEPTH, ROWS, LANES) < columns - first_column
        class_column += head
    wanted = mask & lines(counted, DEPTH)
    x = read(logits_ptr + start + at, wanted, 0.0, DEPTH)
    y = read(teacher_ptr + start + at, wanted, 0.0, DEPTH)
    gradient = exp2((x - across(shift_x)) * inverse) * across(scale_x)
    if CLASS_BIAS:
        y = tl.fma(of_classes(bias_ptr, class_column, wanted, DEPTH), temperature, y)
    target = exp2((y - across(shift_y)) * inverse) * across(scale_y)
    if CLASS_WEIGHTS:
        target *= of_classes(class_weights_ptr, class_column, wanted, DEPTH)
    gradient -= target
    write(gradient_ptr + start + at, tl.where(across(counted), gradient, 0.0), mask)
