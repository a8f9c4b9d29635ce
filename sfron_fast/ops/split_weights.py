"""A weight in two pieces: the bf16 parameter, rounded, and the difference that rounding made.

The pieces are those of the fp32 number's bits, so that together they are the number: the parameter
its upper 16, rounded to nearest, and a correction what those are off by: int16, which is all of
fp32, or int8, which leaves out its last 8 bits. Those are dithered: rounded to nearest, a weight
would stand still under updates of less than half of its last bit.
"""

import math

import torch
from torch import Tensor

from .bits import thresholds

CORRECTIONS = {24: torch.int8, 32: torch.int16}  # by ``weight_bits``


def join(param: Tensor, correction: Tensor) -> Tensor:
    """bf16 and its correction, of one shape -> fp32.

    A parameter that somebody else has written moves the weight with it: the correction stays, which
    is half a unit of bf16 at most.
    """
    bits = param.view(torch.int16).to(torch.int64) & 0xFFFF
    shift = 8 if correction.dtype == torch.int8 else 0
    # the magnitude: 0 with a correction below it is 0
    value = (((bits & 0x7FFF) << 16) + (correction.to(torch.int64) << shift)).clamp(min=0)
    return _floats((bits >> 15 << 31) | value)


def split(x: Tensor, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 -> bf16 and its correction, int8 or int16, of the same shape.

    int8 is dithered by where an element lies in x and by ``step``, as ``bits.dithered``; int16 is
    exact but for the payload of a NaN.
    """
    bits = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    shift = 8 if dtype == torch.int8 else 0
    if shift:
        bits = bits + (thresholds(x, step) >> 8)
    whole = bits >> shift  # 24 or 32 bits
    half = 1 << (15 - shift)
    top = (whole + half) >> (16 - shift)
    nan = x.isnan()
    correction = torch.where(nan, 0, whole - (top << (16 - shift)))
    param = torch.where(top < 1 << 15, top, top - (1 << 16)).to(torch.int16).view(torch.bfloat16)
    return torch.where(nan, torch.full_like(param, math.nan), param), correction.to(dtype)


def _floats(bits: Tensor) -> Tensor:
    """The low 32 bits as fp32."""
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)
