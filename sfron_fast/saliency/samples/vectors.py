"""Norms, and what is added or multiplied: as large a gradient as the parameter."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.dtypes import wide
from .uses import Cut, Use, bias_use, over_channels, summed


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
    if training or running_mean is None or running_var is None:
        return []
    mean, var = running_mean, running_var

    def reduce(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        samples, channels, size = x.shape
        statistics = [s.to(x.dtype).expand(samples, channels).reshape(-1) for s in (mean, var)]
        one = x.new_ones(samples * channels)
        flat = (1, samples * channels, size)
        parts = torch.ops.aten.native_batch_norm_backward(
            delta.reshape(flat),
            x.reshape(flat),
            one,
            *statistics,
            None,
            None,
            False,
            eps,
            [False, True, True],
        )
        return parts[1], parts[2]

    return _by_channel(input, reduce, weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Use]:
    """F.instance_norm: each channel is a group, or by running statistics."""
    if use_input_stats:
        return group_norm(input, input.shape[1], weight, bias, eps)
    return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _trailing(
    input: Tensor, normal: Callable[[Tensor], Tensor], weight: Tensor | None, bias: Tensor | None
) -> list[Use]:
    uses = [] if bias is None else [bias_use(bias)]
    if weight is None:
        return uses
    shape = weight.shape

    def vector(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return summed(cut(delta * normal(wide(saved[0]))), shape)

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
        delta, x = (cut(wide(t)) for t in (delta, saved[0]))
        samples, k, channels = x.shape[:3]
        rows = (samples * k, channels, -1)
        sums = reduce(delta.reshape(rows).contiguous(), x.reshape(rows).contiguous())
        first, second = (s.view(samples, k, channels).sum(1) for s in sums)
        others[:] = [second]
        return first

    def offsets(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return others.pop() if others else over_channels(cut(delta))

    uses = [] if weight is None else [Use(weight, "vector", (input,), scales)]
    return uses if bias is None else [*uses, Use(bias, "vector", (), offsets)]


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
            delta = wide(delta) * saved[0]
        return summed(cut(delta), shape)

    return Use(parameter, "vector", () if factor is None else (factor,), vector)


def expand(input: Tensor, *sizes: Any) -> list[Use]:
    """parameter.expand(samples, ...), as a class token's."""
    dims = len(sizes[0]) if isinstance(sizes[0], (tuple, list)) else len(sizes)
    return [_broadcast(input, None)] if dims > input.dim() or len(input) == 1 else []
