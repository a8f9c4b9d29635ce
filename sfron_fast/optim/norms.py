"""The norm that a step is clipped by: over groups, devices and the shards of every mesh."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional
from ..distributed.shards import Place, place, sharded_places, whole_norm
from .batch import Batch

Scale = Callable[[torch.device], Tensor | None]


def global_norms(
    batches: list[Batch], params: list[Tensor], scale: Scale
) -> dict[torch.device, Tensor]:
    """Norm of the batches' masked gradients divided by ``scale``, fp32 [], beside the parameters of
    every device.

    ``params`` are all of the optimizer: a rank without gradient on a mesh still takes part in that
    mesh's sum.
    """
    places: dict[Place, list[Batch]] = {p: [] for p in sharded_places(params)}
    for batch in batches:
        places.setdefault(place(batch.params[0]), []).append(batch)
    parts = [
        whole_norm(_norm(there, device, scale), layout)
        for (device, layout), there in places.items()
    ]
    devices = dict.fromkeys(device for device, _ in places)
    if len(parts) == 1:
        return dict.fromkeys(devices, parts[0])
    return {d: torch.linalg.vector_norm(torch.stack([n.to(d) for n in parts])) for d in devices}


def _norm(batches: list[Batch], device: torch.device, scale: Scale) -> Tensor:
    if not batches:
        return torch.zeros((), device=device)
    masks = batches[0].mask_argument() if len(batches) == 1 else []
    if len(batches) > 1 and any(batch.masks for batch in batches):
        none = torch.empty(0, dtype=torch.uint8, device=device)
        masks = [m for batch in batches for m in batch.masks or [none] * len(batch.grads)]
    lists = [batch.grad_argument() for batch in batches]
    grads = lists[0] if len(lists) == 1 else [g for grads in lists for g in grads]
    return functional.masked_grad_norm(grads, masks, grad_scale=scale(device))
