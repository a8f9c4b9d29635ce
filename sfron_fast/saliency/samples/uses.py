"""What known functions do with a parameter, so that each sample's own gradient can be told from the
function's inputs and the gradient of its output, without making it.

With delta the gradient of the output, sample by sample:

- product: of a linear layer or a convolution, the sum over positions of delta x^T;
- rows: of an embedding, delta added to the rows of the sample's own tokens;
- vector: of biases, norms and what is added or multiplied, as large as the parameter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import require
from ...ops.dtypes import wide

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
    tiled: bool = False  # a product that read gives in Tiles


@dataclass(frozen=True)
class Tiles:
    """A product in parts: ``each()`` gives (first row, end, deltas, inputs), whose deltas belong to
    these rows of the parameter.
    """

    each: Callable[[], Iterator[tuple[int, int, Tensor, Tensor]]]


def flat(by_sample: Tensor) -> Tensor:
    """[samples, positions..., features] -> [samples, positions, features]."""
    return by_sample.flatten(1, -2)


def summed(by_sample: Tensor, shape: torch.Size) -> Tensor:
    """[samples, k, ...] -> [samples, *shape], the sum over whatever a parameter of that shape was
    broadcast along, in fp32 (fp64).

    Raises:
        ValueError: the parameter has rows of its own where samples are.
    """
    more = max(len(shape) - (by_sample.dim() - 2), 0)  # its dimensions beside samples and k
    expected = "parameters of one row beside samples"
    require(set(shape[:more]) <= {1}, "estimator", expected, list(shape), "use 'batch'")
    own = shape[more:]
    inner = by_sample.dim() - 2 - len(own)  # dimensions before those of the parameter
    sizes = by_sample.shape[2 + inner :]
    dims = list(range(1, 2 + inner))
    dims += [2 + inner + i for i, n in enumerate(own) if n == 1 and sizes[i] > 1]
    return wide(by_sample).sum(dims).reshape(len(by_sample), *shape)


def bias_use(bias: Tensor) -> Use:
    """A bias [features], or of any shape that is broadcast to the output's last dimensions."""

    def vector(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return summed(cut(delta), bias.shape)

    return Use(bias, "vector", (), vector)


def channels_use(bias: Tensor) -> Use:
    """A bias [channels] of an output [samples, channels, ...]."""

    def vector(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return over_channels(cut(delta))

    return Use(bias, "vector", (), vector)


def over_channels(by_sample: Tensor) -> Tensor:
    """[samples, k, channels, ...] -> [samples, channels]."""
    return wide(by_sample).sum([d for d in range(1, by_sample.dim()) if d != 2])
