"""Linear layers, convolutions and embeddings: a sum of products, and rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .uses import Cut, Use, bias_use, channels_use, flat


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Use]:
    """F.linear: weight [out, in]."""
    if input.dim() < 2 or weight.dim() != 2:  # a vector in, or a number out
        return []

    def product(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> tuple[Tensor, Tensor]:
        return flat(cut(delta)), flat(cut(saved[0].to(delta.dtype)))

    uses = [Use(weight, "product", (input,), product)]
    return uses if bias is None else [*uses, bias_use(bias)]


def matmul(input: Tensor, other: Tensor) -> list[Use]:
    """input @ weight [in, out]."""

    def product(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> tuple[Tensor, Tensor]:
        return flat(cut(saved[0].to(delta.dtype))), flat(cut(delta))

    matrices = input.dim() > 1 and other.dim() == 2
    return [Use(other, "product", (input,), product)] if matrices else []


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> list[Use]:
    """input + mat1 @ mat2: transformers' Conv1D, with weight [in, out]."""
    plain = beta == 1 and alpha == 1
    return [*matmul(mat1, mat2), bias_use(input)] if plain else []


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> list[Use]:
    """F.conv1d, conv2d, conv3d: weight [out, in / groups, *kernel]. The inputs of an output's
    position are a window of the padded image: a view, in which elements occur several times.
    """
    rank = weight.dim() - 2
    if input.dim() != weight.dim():
        return []
    kernel, step, spread = weight.shape[2:], _each(stride, rank), _each(dilation, rank)
    pads = _pads(padding, kernel, spread)

    def product(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> tuple[Tensor, Tensor]:
        image = saved[0].to(delta.dtype)
        image = cut(F.pad(image, pads) if any(pads) else image)
        places = delta.shape[2:]
        outer, inner = image.stride()[:3], image.stride()[3:]
        shape = (*image.shape[:2], *places, image.shape[2], *kernel)
        strides = (
            *outer[:2],
            *(s * n for s, n in zip(inner, step, strict=True)),
            outer[2],
            *(s * n for s, n in zip(inner, spread, strict=True)),
        )
        return cut(delta).movedim(2, -1), image.as_strided(shape, strides, image.storage_offset())

    uses = [Use(weight, "product", (input,), product)]
    return uses if bias is None else [*uses, channels_use(bias)]


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _pads(padding: Any, kernel: torch.Size, spread: tuple[int, ...]) -> list[int]:
    """For F.pad: last dimension first, below and above."""
    if padding == "valid":
        padding = 0
    pads: list[int] = []
    if padding == "same":
        for n, d in zip(reversed(kernel), reversed(spread), strict=True):
            total = d * (n - 1)
            pads += [total // 2, total - total // 2]
        return pads
    for n in reversed(_each(padding, len(kernel))):
        pads += [n, n]
    return pads


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Use]:
    """F.embedding: weight [rows, width]. One that counts tokens over the batch mixes samples."""
    if max_norm is not None or scale_grad_by_freq or input.dim() == 0:
        return []

    def rows(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> tuple[Tensor, Tensor]:
        ids = saved[0]
        if padding_idx is not None:
            padding = ids == padding_idx % len(weight)
            delta = delta.masked_fill(padding.expand(delta.shape[:-1]).unsqueeze(-1), 0.0)
        return flat(cut(delta)), cut(ids.expand(delta.shape[:-1])).flatten(1)

    return [Use(weight, "rows", (input,), rows)]
