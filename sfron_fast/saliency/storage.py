"""Where the bits of a mask lie: in one tensor per device."""

from collections.abc import Mapping

import torch
from torch import Tensor


def stored(bits: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The bits copied into one tensor per device, and each entry's part of it: an edit of one shows
    in one version.
    """
    total: dict[torch.device, int] = {}
    places = {}
    for name, packed in bits.items():
        places[name] = start = (
            -(-total.get(packed.device, 0) // 16) * 16
        )  # so that kernels may load 16 bytes
        total[packed.device] = start + packed.numel()
    with torch.inference_mode(False), torch.no_grad():
        stores = {
            device: torch.zeros(size, dtype=torch.uint8, device=device)
            for device, size in total.items()
        }
        parts = {
            n: stores[b.device][places[n] : places[n] + b.numel()].copy_(b) for n, b in bits.items()
        }
    return list(stores.values()), parts
