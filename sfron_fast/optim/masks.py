"""The masks of a parameter group, found by name in a SaliencyMask and laid out as a step takes
them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.shards import plain
from ..ops.layout import Orders
from ..ops.lists import flatten_masks
from ..saliency.mask import SaliencyMask
from .batch import repacked
from .flat_state import same


def check_saliency(saliency: Any) -> None:
    """Raise ValueError unless it is a mask, or None."""
    if saliency is not None and not isinstance(saliency, SaliencyMask):
        raise ValueError(
            f"saliency: expected a SaliencyMask or None, found {type(saliency).__name__}; "
            "build one with SaliencyMask.from_fisher or SaliencyMask.load"
        )


class GroupMask(NamedTuple):
    """What was found, and for what: a mask that is replaced or edited, a parameter that is moved
    needs it anew.
    """

    saliency: SaliencyMask
    version: int
    params: list[Tensor]
    orders: Orders
    masks: list[Tensor]
    flat: Tensor | None  # the same as one flat list

    @classmethod
    def of(
        cls, group: Mapping[str, Any], saliency: SaliencyMask | None, orders: Orders
    ) -> "GroupMask":
        """Raises ValueError if there is no mask, or one of the parameters has none in it."""
        if saliency is None:
            raise ValueError(
                "masked: expected masked=False in an optimizer without saliency, found masked=True"
            )
        names, params = group.get("param_names"), group["params"]
        if names is None:
            raise ValueError(
                "params: expected named parameters (a mask is keyed by name), found unnamed ones;"
                " pass model.named_parameters(), or masked=False in the group; with a Hugging Face"
                " Trainer use optimizer_factory of sfron_fast.integrations.transformers"
            )
        version = -1 if torch.compiler.is_compiling() else saliency.version
        masks = repacked(saliency.resolve(list(zip(names, params, strict=True))), params, orders)
        flat = flatten_masks(masks, params) if masks and plain(params) else None
        return cls(saliency, version, list(params), orders, masks, flat)

    def current(self, saliency: SaliencyMask | None) -> bool:
        """Whether it is of this mask, as it is now.

        What torch.compile has compiled sees another mask, but no edit of this one.
        """
        edited = not torch.compiler.is_compiling() and self.version != self.saliency.version
        return self.saliency is saliency and not edited

    def serves(self, saliency: SaliencyMask | None, params: list[Tensor], orders: Orders) -> bool:
        """Whether it is still good."""
        good = self.current(saliency) and same(self.params, params) and self.orders == orders
        return good and self.masks[0].device == params[0].device
