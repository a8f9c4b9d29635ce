"""Flat lists: one tensor that stands for many, one after another, each from a multiple of 64
elements.

The optimizers keep their state so. A call then passes one handle in place of thousands, which is
what small tensors cost; and a mask's bits start at a whole word.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import require
from . import native
from .layout import Orders, unordered

UNIT = 64


def listed(name: str, tensors: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The list of a call's argument; None = empty.

    Raises:
        ValueError: it is one tensor.
    """
    if tensors is None:
        return []
    if type(tensors) in (list, tuple):
        return tensors
    found = f"a tensor {tuple(tensors.shape)}" if hasattr(tensors, "shape") else ""
    require(not found, name, "a list of tensors", found, "write it in brackets")
    return tensors


def flat_size(like: Sequence[Tensor]) -> int:
    """Elements of a flat list shaped like ``like``."""
    return sum(-(-t.numel() // UNIT) * UNIT for t in like)


def is_flat(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> bool:
    """Whether the one tensor given stands for all of ``like``."""
    return len(tensors) == 1 and len(like) > 1


def spread(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors of a flat list, as views shaped like ``like``; any other list as it is."""
    return list(views(tensors[0], like)) if is_flat(tensors, like) else tensors


def spread_masks(masks: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The packed masks of a flat list; any other list as it is."""
    if not is_flat(masks, like):
        return masks
    starts = _starts(like)
    return [
        masks[0][s // 8 : s // 8 + (t.numel() + 7) // 8] for s, t in zip(starts, like, strict=True)
    ]


def spread_scalars(scalars: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The scalars [] of a flat [tensors]; any other list as it is."""
    return scalars[0].unbind() if is_flat(scalars, like) else scalars


def flatten_masks(masks: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Packed masks as one flat list, uint8 [flat_size / 8]; a single one as it is."""
    if len(like) == 1:
        return masks[0]
    flat = masks[0].new_zeros(flat_size(like) // 8)
    for mask, target in zip(masks, spread_masks([flat], like), strict=True):
        target.copy_(mask)
    return flat


def _starts(like: Sequence[Tensor]) -> Iterator[int]:
    start = 0
    for t in like:
        yield start
        start += -(-t.numel() // UNIT) * UNIT


def views(flat: Tensor, like: Sequence[Tensor], orders: Orders = ()) -> Iterator[Tensor]:
    """The tensors of a flat one, shaped and laid out as ``like``."""
    for start, t, order in zip(_starts(like), like, orders or [None] * len(like), strict=True):
        yield unordered(flat[start : start + t.numel()], t.shape, order)


def zeroed(tensor: Tensor) -> Tensor:
    """``tensor``, just allocated, filled with zero; on Linux a large one on the CPU is given huge
    pages, if there are.

    Steps stream through it, and with pages of 4 KB the look-up of addresses holds them up. Torch's
    own allocations ask for huge pages only under ``THP_MEM_ALLOC_ENABLE=1``.
    """
    if not torch.compiler.is_compiling():
        native.ask_huge_pages(tensor)
    return tensor.zero_()
