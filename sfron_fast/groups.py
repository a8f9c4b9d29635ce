"""What an optimizer updates in one call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flat import FlatStates


class Batch(NamedTuple):
    """The parameters of one group, on one device, that have a gradient; lists run in parallel."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    masks: list[Tensor]
    flat: FlatStates | None = None  # for whole groups: one handle per kind of state instead of one per parameter
    flat_mask: Tensor | None = None

    def on(self, device: torch.device) -> "Batch":
        """The part of it on one device."""
        return self.part([i for i, p in enumerate(self.params) if p.device == device])

    def part(self, chosen: list[int]) -> "Batch":
        """Some of its parameters."""
        params, grads, masks = ([t[i] for i in chosen] if t else [] for t in self[1:4])
        return Batch(self.group, params, grads, masks)

    def mask_argument(self) -> list[Tensor]:
        """The masks as the ops take them."""
        return self.masks if self.flat_mask is None else [self.flat_mask]
