"""Head and loss in one (``sf.linear_logp``): its logits are never all in memory, so the squares of
the head's weight are added tile by tile of the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops.dtypes import wide
from ...ops.linear_logp import forward, gradient_tiles
from ...ops.linear_tiles import Head, counted_rows, multiplied, spread, taken
from .uses import Cut, Tiles, Use


def head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> list[Use]:
    """linear_logp: weight [classes, features], bias [classes]."""
    numbers = (softcap, logit_scale, ignore_index)
    held = None if bias is None else bias.detach()

    def deltas(
        delta: Tensor, hidden: Tensor, labels: Tensor, cut: Cut
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Tiles [samples, positions, tile] of the gradient at the logits, as F.linear has them."""
        plain = weight.detach()
        logp, _, log_sums = forward(hidden, plain, labels, held, *numbers)
        rows, tiled = counted_rows(labels, ignore_index), Head(plain, held, softcap, logit_scale)
        to_logp, to_lse = (g.contiguous() for g in delta.unbind(1))
        to_logp, to_lse, kept, counted, logp = taken(
            rows, to_logp, to_lse, multiplied(hidden), labels, logp
        )
        sums = torch.stack(taken(rows, *log_sums))
        tiles, size = gradient_tiles(to_logp, to_lse, kept, counted, logp, sums, tiled)
        scale = (size * logit_scale).unsqueeze(1)
        for tile in tiles:
            values = spread(rows, tile.values.to(scale.dtype) * scale, len(labels))
            yield tile.start, tile.stop, cut(values).flatten(1, -2)

    def product(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tiles:
        inputs = cut(wide(saved[0])).flatten(1, -2)
        return Tiles(lambda: ((*tile, inputs) for tile in deltas(delta, saved[0], saved[1], cut)))

    def vector(delta: Tensor, saved: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return torch.cat([tile.sum(1) for _, _, tile in deltas(delta, saved[0], saved[1], cut)], 1)

    saved: Any = (hidden, labels)
    uses = [Use(weight, "product", saved, product, tiled=True)]
    return uses if bias is None else [*uses, Use(bias, "vector", saved, vector)]
