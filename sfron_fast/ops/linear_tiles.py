"""A language model's head in tiles of its vocabulary: logits that are never all in memory.

``logit_tiles`` makes them, ``softmax_tiles`` turns each into the gradient at the logits, and
``head_gradients`` gathers from those the gradients of what the head multiplies. The matrix products
are torch's; whatever the dtype, logits and sums are fp32 (fp64 for fp64).

logits = softcap * tanh(logit_scale * (hidden weight^T + bias) / softcap), without a softcap
logit_scale * (hidden weight^T + bias): the order of Hugging Face's models (Cohere scales, Gemma 2
caps; Granite divides by logits_scaling, so its logit_scale is the inverse).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import linear_rows
from .dtypes import accumulate_dtype, wide

# bytes of one tile of logits, and its most classes: on a CPU 1,024 to 4,096 take the same time, on
# a GPU the products must fill the device
TILE_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
TILE_CLASSES = {"cpu": 4096, "cuda": 16_384}


class Head(NamedTuple):
    """What makes logits of hidden states."""

    weight: Tensor  # [classes, features]
    bias: Tensor | None = None  # [classes]
    softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """All of them at once [rows, classes], in operations that torch differentiates."""
        found = wide(hidden) @ wide(self.weight).t()
        if self.bias is not None:
            found = found + wide(self.bias)
        return self.scaled(found)

    def scaled(self, products: Tensor) -> Tensor:
        """Logits of hidden weight^T + bias."""
        found = products * self.logit_scale
        return found if self.softcap is None else (found / self.softcap).tanh() * self.softcap


class WeightTiles:
    """A head's weights in the dtype that is multiplied: views, or copies in one tile's memory."""

    def __init__(self, head: Head, size: int, like: Tensor) -> None:
        self.weight, self.at = head.weight, (0, 0)
        narrow = head.weight.dtype != like.dtype
        self.copy = like.new_empty(size, head.weight.shape[1]) if narrow else None

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, features], good until other rows are asked for."""
        weight = self.weight[start:stop]
        if self.copy is None:
            return weight
        copy = self.copy[: stop - start]
        if self.at != (start, stop):
            copy.copy_(weight)
            self.at = start, stop
        return copy


class Tile(NamedTuple):
    """Classes [start, stop) of all rows."""

    start: int
    stop: int
    weights: WeightTiles
    values: Tensor  # [rows, stop - start]: logits, or d / d logits; reused


def multiplied(tensor: Tensor) -> Tensor:
    """In the dtype that the matrix products take: narrow ones are slow on a CPU, so fp32 there."""
    return wide(tensor) if tensor.device.type == "cpu" else tensor


def product(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """out = left right, or out += left right, summed and stored in fp32."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=1.0 if add else 0.0, out=out)
    elif add:  # a GPU's: there alone torch stores another dtype than it reads
        out += torch.mm(left, right, out_dtype=out.dtype)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def tile_classes(rows: int, classes: int, device: torch.device) -> int:
    """How many classes a tile has."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    fitting = TILE_BYTES[kind] // (4 * max(rows, 1))
    return min(classes, TILE_CLASSES[kind], max(64, fitting // 64 * 64))


def logit_tiles(hidden: Tensor, head: Head, memory: Tensor | None = None) -> Iterator[Tile]:
    """Of hidden [rows, features], which ``multiplied`` has seen; each in the memory of the last, or
    one after the other in ``memory`` [at least rows * classes].
    """
    rows, classes = hidden.shape[0], head.weight.shape[0]
    size = tile_classes(rows, classes, hidden.device)
    keep = memory is not None
    if memory is None:
        memory = hidden.new_empty(rows * size, dtype=accumulate_dtype(hidden.dtype))
    weights = WeightTiles(head, size, hidden)
    for start in range(0, classes, size):
        stop = min(start + size, classes)
        used = rows * start if keep else 0
        values = memory[used : used + rows * (stop - start)].view(rows, stop - start)
        product(hidden, weights.rows(start, stop).t(), values)
        if head.bias is not None:
            values += head.bias[start:stop]
        if head.logit_scale != 1.0:
            values *= head.logit_scale
        if head.softcap is not None:
            values.div_(head.softcap).tanh_().mul_(head.softcap)
        yield Tile(start, stop, weights, values)


class LogSums:
    """Log-sum-exps of rows, tile by tile, the label's term apart.

    What is small beside the e^0 of a label that is the maximum, the loss of a remembered token,
    keeps its digits.
    """

    def __init__(self, labels: Tensor, like: Tensor) -> None:
        dtype = accumulate_dtype(like.dtype)
        self.labels = labels
        self.maximum = like.new_full(labels.shape, -torch.inf, dtype=dtype)
        self.others = like.new_zeros(labels.shape, dtype=dtype)  # sum e^(x - shift)
        # the label's logit; NaN shows a label that lies in no tile
        self.picked = like.new_full(labels.shape, torch.nan, dtype=dtype)

    def shift(self) -> Tensor:
        """What is subtracted from the logits: the maximum so far, 0 where that is infinite."""
        return linear_rows.shift_of(self.maximum)

    def add(self, tile: Tile) -> None:
        """One more tile of the rows."""
        add = linear_rows.serving("linear_log_sums_", tile.values)
        add(tile.values, self.labels, tile.start, self.maximum, self.others, self.picked)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """log p(label), shift and log sum e^(x - shift), each [rows]."""
        shift = self.shift()
        relative = self.picked - shift
        log_sum = torch.log1p(self.others + torch.expm1(relative))
        return relative - log_sum, shift, log_sum


def softmax_tiles(
    tiles: Iterable[Tile],
    head: Head,
    labels: Tensor,
    sums: Tensor,
    factor: Tensor,
    label: Tensor,
    dtype: torch.dtype,
) -> Iterator[Tile]:
    """The tiles' logits x become d / d (logit_scale (hidden weight^T + bias)), in ``dtype``.

    At x that is factor * softmax(x), and ``label`` at the label; sums [2, rows]: shift and log sum;
    labels, factor, label [rows].
    """
    shift, log_sum = sums
    factor = factor * torch.exp(-log_sum)
    for tile in tiles:
        values = tile.values
        out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
        convert = linear_rows.serving("linear_gradient_", values)
        convert(values, labels, tile.start, shift, factor, label, head.softcap, out)
        yield tile._replace(values=out)


class Gradients(NamedTuple):
    """Of hidden, weight and bias; None where none is needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def returned(
        self, rows: Tensor | None, total: int, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As an op returns them: hidden of all rows, in the weight's dtype; empty for None."""
        hidden, weight, bias = (like.new_empty(0) if t is None else t for t in self)
        if self.hidden is not None:
            hidden = spread(rows, hidden, total).to(like.dtype)
        return hidden, weight, bias


def head_gradients(
    tiles: Iterable[Tile],
    hidden: Tensor,
    head: Head,
    row_scale: Tensor,
    needed: Sequence[bool],
    sums: Gradients | None = None,
) -> Gradients:
    """From tiles of d / d logits in the dtype of hidden, but for each row's row_scale [rows].

    That goes to the side of the hidden states, whose rows are shorter: what is multiplied in a
    narrow dtype stays near 1. A tile's rows of d / d weight are whole at once and rounded to the
    weight's dtype, so no accumulator of its size is needed; that of d / d hidden, which is
    returned, is fp32. With ``sums``, fp32, what is found of weight and bias is added there.
    """
    dtype = accumulate_dtype(hidden.dtype)
    scale = (row_scale * head.logit_scale).unsqueeze(1)
    add = sums is not None
    if sums is None:
        sums = Gradients(
            None,
            torch.empty_like(head.weight) if needed[1] else None,
            torch.empty_like(head.bias) if needed[2] and head.bias is not None else None,
        )
    to_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needed[0] else None
    scaled = hidden if sums.weight is None else (hidden * scale).to(hidden.dtype)
    unrounded: Tensor | None = None  # of one tile
    for tile in tiles:
        delta, rows = tile.values, slice(tile.start, tile.stop)
        if to_hidden is not None:
            product(delta, tile.weights.rows(tile.start, tile.stop), to_hidden, add=True)
        if sums.weight is not None:
            target = sums.weight[rows]
            if target.dtype == dtype:
                product(delta.t(), scaled, target, add)
            else:
                if unrounded is None:
                    unrounded = torch.empty_like(target, dtype=dtype)
                product(delta.t(), scaled, unrounded[: len(target)])
                target.copy_(unrounded[: len(target)])
        if sums.bias is not None:
            found = torch.mv(tile.values.t().to(dtype), scale.squeeze(1))
            sums.bias[rows] = sums.bias[rows] + found if add else found
    if to_hidden is not None:
        to_hidden *= scale
    return Gradients(to_hidden, sums.weight, sums.bias)


def counted_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that have a label, or None if all have; a GPU is waited for."""
    counted = labels != ignore_index
    return None if bool(counted.all()) else counted.nonzero().squeeze(1)


def taken(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Those rows of each."""
    return tensors if rows is None else tuple(t.index_select(0, rows) for t in tensors)


def spread(rows: Tensor | None, tensor: Tensor, total: int) -> Tensor:
    """The inverse of ``taken``: 0 in the other rows."""
    if rows is None:
        return tensor
    return tensor.new_zeros((total, *tensor.shape[1:])).index_copy_(0, rows, tensor)
