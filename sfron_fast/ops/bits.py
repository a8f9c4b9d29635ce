"""Bits: packed masks (element i of the flattened tensor is bit i % 8 of byte i // 8), and bf16 by
dithering.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import require


def pack_bits(selected: Tensor) -> Tensor:
    """A mask for the list functions: bool of any shape, n elements -> uint8 [ceil(n / 8)], element
    i in bit i % 8 of byte i // 8, unused high bits zero.

    Raises:
        ValueError: it is no tensor of bool.
    """
    good = isinstance(selected, Tensor) and selected.dtype == torch.bool
    found = selected.dtype if isinstance(selected, Tensor) else type(selected).__name__
    require(good, "selected", "a tensor of bool", found, "compare it: mask != 0")
    flat = selected.reshape(-1)
    padded = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    shifts = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) << shifts).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool of ``shape``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts).bitwise_and(1).to(torch.bool)
    return bits.view(-1)[: math.prod(shape)].view(tuple(shape))


def selected_bits(masks: Sequence[Tensor], i: int, like: Tensor) -> Tensor | None:
    """The i-th mask as bool shaped like the tensor, or None where every weight is selected."""
    if not masks or (masks[i].numel() == 0 and like.numel() > 0):
        return None
    return unpack_bits(masks[i], like.shape)


def dithered(x: Tensor, step: int) -> Tensor:
    """x, fp32, in bf16 and of the same shape: rounded up where what is cut off reaches a threshold
    in place of a half.

    For an average that moves by less than half a unit a step: rounded to nearest it would stand
    still. An element's thresholds are spread evenly over the steps (by the golden ratio), so what
    single steps lose adds up to nothing. They depend on where it lies in x: of a shard, or of a
    weight in another layout, the bits differ.
    """
    bits = (x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + thresholds(x, step)
    bits = bits >> 16
    half = torch.where(bits < 1 << 15, bits, bits - (1 << 16)).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.full_like(half, math.nan), half)


def thresholds(x: Tensor, step: int) -> Tensor:
    """int64 of x's shape, each in [0, 2^16): by where an element lies in x, and by the step."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    return ((index * 0x85EBCA77 + (step & 0xFFFFFFFF) * 0x9E3779B9) & 0xFFFFFFFF) >> 16
