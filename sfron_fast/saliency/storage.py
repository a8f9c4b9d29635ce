"""How the bits of a mask lie: packed, eight weights to a byte, in one tensor per device."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import require


def check_bits(bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless each has as many bytes as its parameter's shape wants."""
    for name, packed in bits.items():
        shape = shapes[name]
        good = all(type(size) is int and 0 <= size < 2**63 for size in shape)
        require(good, f"shapes[{name!r}]", "integers >= 0", shape)
        size = (math.prod(shape) + 7) // 8
        good = packed.dtype == torch.uint8 and packed.shape == (size,)
        found = f"{packed.dtype} {list(packed.shape)}"
        require(good, f"bits[{name!r}]", f"uint8 [{size}]", found)


def stored(bits: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The bits copied into one tensor per device, and each entry's part of it: an edit of one shows
    in one version.
    """
    total: dict[torch.device, int] = {}
    places = {}
    for name, packed in bits.items():
        # so that kernels may load 16 bytes
        places[name] = start = -(-total.get(packed.device, 0) // 16) * 16
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
