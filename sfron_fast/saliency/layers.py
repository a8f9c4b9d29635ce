"""What known functions do with a parameter, so that each sample's own gradient can be told from the
function's inputs and the gradient of its output, without making it.

With delta the gradient of the output, sample by sample:

- product: of a linear layer or a convolution, the sum over positions of delta x^T;
- rows: of an embedding, delta added to the rows of the sample's own tokens;
- vector: of biases, norms and what is added or multiplied, as large as the parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.dtypes import accumulate_dtype

# a tensor [samples * k, ...] or laid out otherwise -> [samples, k, ...]
Cut = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Use:
    """One parameter in one call: what to keep for the backward, and how to read delta then."""

    parameter: Tensor
    kind: str  # "product", "rows" or "vector"
    saved: tuple[Tensor, ...]
    # (delta, saved, cut) -> (deltas [samples, positions..., out], inputs [samples, positions...,
    # in...]) | (deltas [samples, positions, width], ids [samples, positions]) | [samples, *shape]
    read: Callable[[Tensor, tuple[Tensor, ...], Cut], Any]


def _flat(by_sample: Tensor) -> Tensor:
    """[samples, positions..., features] -> [samples, positions, features]."""
    return by_sample.flatten(1, -2)


def _summed(by_sample: Tensor, shape: torch.Size) -> Tensor:
    """[samples, k, ...] -> [samples, *shape], the sum over whatever a parameter of that shape was
    broadcast along, in fp32 (fp64).
    """
    wide = by_sample.to(accumulate_dtype(by_sample.dtype))
    inner = wide.dim() - 2 - len(shape)  # dimensions before those of the parameter
    dims = list(range(1, 2 + inner))
    dims += [2 + inner + i for i, n in enumerate(shape) if n == 1 and wide.shape[2 + inner + i] > 1]
    return wide.sum(dims).reshape(len(wide), *shape)


# --- products -------------------------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Use]:
    """F.linear: weight [out, in]."""

    def product(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> tuple[Tensor, Tensor]:
        return _flat(cut(delta)), _flat(cut(saved[0].to(delta.dtype)))

    uses = [Use(weight, "product", (input,), product)]
    return uses if bias is None else [*uses, _bias(bias)]


def matmul(input: Tensor, other: Tensor) -> list[Use]:
    """input @ weight [in, out]."""

    def product(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> tuple[Tensor, Tensor]:
        return _flat(cut(saved[0].to(delta.dtype))), _flat(cut(delta))

    return [Use(other, "product", (input,), product)] if other.dim() == 2 else []


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> list[Use]:
    """input + mat1 @ mat2: transformers' Conv1D, with weight [in, out]."""
    plain = beta == 1 and alpha == 1
    return [*matmul(mat1, mat2), _bias(input)] if plain else []


def _bias(bias: Tensor) -> Use:
    def vector(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return _summed(cut(delta), bias.shape)

    return Use(bias, "vector", (), vector)


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
        image = cut(F.pad(saved[0].to(delta.dtype), pads))
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
    return uses if bias is None else [*uses, _channels(bias)]


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


# --- rows -----------------------------------------------------------------------------------------


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
    if max_norm is not None or scale_grad_by_freq:
        return []

    def rows(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> tuple[Tensor, Tensor]:
        ids = saved[0]
        if padding_idx is not None:
            padding = ids == padding_idx % len(weight)
            delta = delta.masked_fill(padding.expand(delta.shape[:-1]).unsqueeze(-1), 0.0)
        return _flat(cut(delta)), cut(ids.expand(delta.shape[:-1])).flatten(1)

    return [Use(weight, "rows", (input,), rows)]


# --- vectors --------------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Use]:
    """F.layer_norm, over the last dimensions."""

    def normal(x: Tensor) -> Tensor:
        return F.layer_norm(x, tuple(normalized_shape), eps=eps)

    return _trailing(input, normal, weight, bias)


def rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> list[Use]:
    """F.rms_norm, over the last dimensions."""

    def normal(x: Tensor) -> Tensor:
        # without eps that of the input's dtype, not that of fp32
        small = torch.finfo(input.dtype).eps if eps is None else eps
        return F.rms_norm(x, tuple(normalized_shape), eps=small)

    return _trailing(input, normal, weight, None)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Use]:
    """F.group_norm, with a weight for each channel."""

    def reduce(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        samples, channels, size = x.shape
        groups = num_groups * samples
        sizes = (1, samples * channels, size, groups)
        one = x.new_ones(samples * channels)
        _, mean, rstd = torch.native_group_norm(x, one, None, *sizes, eps)
        parts = torch.ops.aten.native_group_norm_backward(
            delta, x, mean, rstd, one, *sizes, [False, True, True]
        )
        return parts[1], parts[2]

    return _by_channel(input, reduce, weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Use]:
    """F.batch_norm by running statistics; by the batch's own it mixes samples."""
    if training or running_mean is None:
        return []

    def reduce(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        samples, channels, size = x.shape
        statistics = [s.to(x.dtype).repeat(samples) for s in (running_mean, running_var)]
        one = x.new_ones(samples * channels)
        flat = (1, samples * channels, size)
        parts = torch.ops.aten.native_batch_norm_backward(
            delta.reshape(flat), x.reshape(flat), one, *statistics, None, None, False, eps,
            [False, True, True],
        )
        return parts[1], parts[2]

    return _by_channel(input, reduce, weight, bias)


def _trailing(
    input: Tensor, normal: Callable[[Tensor], Tensor], weight: Tensor | None, bias: Tensor | None
) -> list[Use]:
    uses = [] if bias is None else [_bias(bias)]
    if weight is None:
        return uses
    shape = weight.shape

    def vector(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return _summed(cut(delta * normal(_wide(saved[0]))), shape)

    return [Use(weight, "vector", (input,), vector), *uses]


def _by_channel(
    input: Tensor,
    reduce: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    weight: Tensor | None,
    bias: Tensor | None,
) -> list[Use]:
    """Norms with a weight for each channel. torch's own kernel sums up what a channel's weight and
    bias get; each sample's channels are given to it as channels of one sample.
    """
    others: list[Tensor] = []  # the bias's part, made with the weight's

    def scales(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        delta, x = (cut(_wide(t)) for t in (delta, saved[0]))
        samples, k, channels = x.shape[:3]
        rows = (samples * k, channels, -1)
        sums = reduce(delta.reshape(rows).contiguous(), x.reshape(rows).contiguous())
        first, second = (s.view(samples, k, channels).sum(1) for s in sums)
        others[:] = [second]
        return first

    def offsets(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return others.pop() if others else _over_channels(cut(delta))

    uses = [] if weight is None else [Use(weight, "vector", (input,), scales)]
    return uses if bias is None else [*uses, Use(bias, "vector", (), offsets)]


def _channels(bias: Tensor) -> Use:
    def vector(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return _over_channels(cut(delta))

    return Use(bias, "vector", (), vector)


def _over_channels(by_sample: Tensor) -> Tensor:
    """[samples, k, channels, ...] -> [samples, channels]."""
    return _wide(by_sample).sum([d for d in range(1, by_sample.dim()) if d != 2])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulate_dtype(tensor.dtype))


def add(input: Any, other: Any, *, alpha: float = 1) -> list[Use]:
    """input + parameter, in either order."""
    return [_broadcast(p, None) for p, _ in _beside(input, other)] if alpha == 1 else []


def multiply(input: Any, other: Any) -> list[Use]:
    """input * parameter, in either order."""
    return [_broadcast(p, x) for p, x in _beside(input, other)]


def _beside(input: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """(parameter, what has the samples) as it may be: the samples come first, so a parameter of as
    many dimensions is [1, ...].
    """
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return []
    pairs = ((input, other), (other, input))
    return [(p, x) for p, x in pairs if p.dim() < x.dim() or (p.dim() == x.dim() and len(p) == 1)]


def _broadcast(parameter: Tensor, factor: Tensor | None) -> Use:
    """A parameter that lies beside every sample, times the factor."""
    shape = parameter.shape

    def vector(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        if saved:
            delta = delta.to(accumulate_dtype(delta.dtype)) * saved[0]
        # of [1, ...] beside [samples, ...], the first dimension is the samples'
        own = shape[1:] if len(shape) == delta.dim() else shape
        return _summed(cut(delta), own).reshape(len(cut(delta)), *shape)

    return Use(parameter, "vector", () if factor is None else (factor,), vector)


def expand(input: Tensor, *sizes: Any) -> list[Use]:
    """parameter.expand(samples, ...), as a class token's."""
    dims = len(sizes[0]) if isinstance(sizes[0], (tuple, list)) else len(sizes)
    return [_broadcast(input, None)] if dims > input.dim() or len(input) == 1 else []


KNOWN: dict[Any, Callable[..., list[Use]]] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.mm: matmul,
    torch.Tensor.mm: matmul,
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    torch.add: add,
    torch.Tensor.add: add,
    torch.mul: multiply,
    torch.Tensor.mul: multiply,
    torch.Tensor.expand: expand,
}
