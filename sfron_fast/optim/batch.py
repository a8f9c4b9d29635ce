"""What an optimizer updates in one call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.shards import Place, place
from ..errors import require
from ..ops import reference
from ..ops.arguments import FLOATS
from ..ops.layout import Orders, dense, ordered
from .flat_state import FlatStates

_FLOATS = set(FLOATS)


class Batch(NamedTuple):
    """The parameters of one group, on one device and mesh, that have a gradient; lists run in
    parallel.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    masks: list[Tensor]
    # for whole groups: one handle per kind of state instead of one per parameter
    flat: FlatStates | None = None
    flat_mask: Tensor | None = None
    # of parameters that are dense but not row-major; the masks follow them already
    orders: Orders = ()

    def check(self) -> list[tuple[torch.dtype, torch.Size]]:
        """What the parameters are.

        Raises unless they are floats, and gradients, if there are any, dense and alike.
        """
        kinds = [(p.dtype, p.shape) for p in self.params]
        known = _FLOATS.issuperset(kind[0] for kind in kinds) and {
            g.layout for g in self.grads
        } <= {torch.strided}
        if known and (not self.grads or kinds == [(g.dtype, g.shape) for g in self.grads]):
            return kinds
        for i, p in enumerate(self.params):
            require(
                p.dtype in _FLOATS, f"params[{i}]", "float32, bfloat16, float16 or float64", p.dtype
            )
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            require(g.layout == torch.strided, f"grads[{i}]", "a dense tensor", g.layout)
            require(g.dtype == p.dtype, f"grads[{i}]", f"dtype {p.dtype}", g.dtype)
            require(g.shape == p.shape, f"grads[{i}]", f"shape {tuple(p.shape)}", tuple(g.shape))
        return kinds

    def split(self) -> list["Batch"]:
        """Its parts, each on one device and mesh."""
        places: dict[Place, list[int]] = {}
        for i, p in enumerate(self.params):
            places.setdefault(place(p), []).append(i)
        return [self] if len(places) == 1 else [self.part(chosen) for chosen in places.values()]

    def part(self, chosen: list[int]) -> "Batch":
        """Some of its parameters."""
        params, grads, masks = ([t[i] for i in chosen] if t else [] for t in self[1:4])
        return Batch(
            self.group,
            params,
            grads,
            masks,
            orders=tuple(self.orders[i] for i in chosen if self.orders),
        )

    def arguments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and gradients as the ops take them; a gradient laid out unlike its parameter
        is copied.
        """
        return ordered(self.params, self.orders), self.grad_argument()

    def grad_argument(self) -> list[Tensor]:
        """The gradients as the ops take them."""
        return dense(self.grads, self.orders)

    def mask_argument(self) -> list[Tensor]:
        """The masks as the ops take them."""
        return self.masks if self.flat_mask is None else [self.flat_mask]


def repacked(masks: list[Tensor], tensors: list[Tensor], orders: Orders) -> list[Tensor]:
    """Packed masks whose bits follow memory; one of zero bytes selects all, in any order."""
    if not orders:
        return masks
    return [
        (
            m
            if o is None or m.numel() == 0
            else reference.pack_bits(reference.unpack_bits(m, t.shape).permute(o))
        )
        for m, t, o in zip(masks, tensors, orders, strict=True)
    ]
