"""Moments in 8 bits: a code for each element, and a scale for each group of them.

A code is a small float relative to its group's largest: three bits of mantissa, so that the
next code is 6 to 12 % away at any size, over 16 octaves for exp_avg (int8, with a sign) and 32 for
its square, exp_avg_sq (uint8). A linear code of 8 bits loses all that is below a hundredth of the
largest (benchmarks/results/moment_codes.md). Groups are of ``GROUP`` elements and end with an index
of the first dimension, so that a shard, a rank and the whole tensor have the same ones.
"""

import torch
from torch import Tensor

from .bits import thresholds

GROUP = 256
UNIT = 32  # elements of an index of the first dimension: a multiple of it, or no codes
DROPPED = 20  # bits of an fp32 that a code leaves out
ONE = 0x3F800000 >> DROPPED  # the bits of 1.0 that it keeps: of the largest code
LEAST_SCALE = 2.0**-126
SIGNED, UNSIGNED = torch.int8, torch.uint8
LARGEST = {SIGNED: 127, UNSIGNED: 255}
LEAST = 2.0**-16 * 1.25  # what code 1 of an exp_avg stands for


def row_of(tensor: Tensor) -> int:
    """Elements of one index of the first dimension."""
    return tensor.numel() // max(tensor.shape[0], 1) if tensor.dim() > 0 else 1


def has_codes(tensor: Tensor) -> bool:
    """Whether a weight's moments may be coded: not those of a bias or of few channels, which stay
    fp32.
    """
    return row_of(tensor) > 0 and row_of(tensor) % UNIT == 0


def scales_shape(tensor: Tensor, moments: int) -> tuple[int, int, int]:
    """[first dimension, groups of one index, moments]."""
    return tensor.shape[0], -(-row_of(tensor) // GROUP), moments


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """int8 or uint8 of any shape, scales [first dimension, groups] -> fp32 of that shape."""
    magnitude = codes.to(torch.int32).abs()
    bits = (magnitude + (ONE - LARGEST[codes.dtype])) << DROPPED
    values = torch.where(magnitude == 0, 0.0, bits.view(torch.float32)) * _spread(scales, codes)
    return torch.where(codes < 0, -values, values) if codes.dtype == SIGNED else values


def encode(x: Tensor, step: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 -> codes of its shape, int8 or uint8, and scales [first dimension, groups].

    Between two codes ``step`` dithers, as ``bits.dithered``; without it the nearer one is taken.
    What is not 0 has no code 0 in uint8: the root of it divides. An infinity or a NaN is its whole
    group's.
    """
    size = x.abs().contiguous()
    rows = size.view(x.shape[0], -1)
    # as whole numbers: a NaN is the largest
    most = torch.stack([part.view(torch.int32).amax(1) for part in rows.split(GROUP, 1)], 1)
    scales = most.view(torch.float32).clamp(min=LEAST_SCALE)
    size = size * _spread(1.0 / scales, x)
    if step is None:
        threshold = torch.full(x.shape, 0x8000, dtype=torch.int64, device=x.device)
    else:
        threshold = thresholds(x, step)
    # not quite from 0 to 1: an ulp of the product changes nothing
    bits = (size.view(torch.int32) & 0x7FFFFFFF).to(torch.int64) + (threshold << DROPPED - 16) + 8
    largest = LARGEST[dtype]
    codes = (bits >> DROPPED) - (ONE - largest)
    if dtype == UNSIGNED:
        return codes.clamp(0, largest).maximum((x > 0).to(torch.int64)).to(dtype), scales
    few = (size * (65536.0 / LEAST) > threshold.to(torch.float32)).to(torch.int64)
    codes = torch.where(size < LEAST, few, codes.clamp(0, largest))
    return torch.where(x < 0, -codes, codes).to(dtype), scales


def _spread(scales: Tensor, like: Tensor) -> Tensor:
    """A group's number for each of its elements."""
    row = row_of(like)
    return scales.repeat_interleave(GROUP, 1)[:, :row].reshape(like.shape)
