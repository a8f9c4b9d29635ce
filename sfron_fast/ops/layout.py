"""Weights that are dense but not row-major, as ``to(memory_format=torch.channels_last)`` makes
them.

An update does not ask which dimension is which: with the dimensions in the order of memory, slowest
first, such a weight is an ordinary contiguous tensor, and so are its gradient and its state. Only a
packed mask is packed anew.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

Order = tuple[int, ...] | None  # dimensions, slowest first; None = as they are
Orders = tuple[Order, ...]  # of a list of tensors; empty = all as they are


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; torch.distributed need not be there."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """The local shard of a DTensor (it shares storage); any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def orders_of(tensors: list[Tensor]) -> Orders:
    """The order of each; empty if all stay as they are.

    What has gaps stays (the ops copy it), a DTensor, and what has no strides: a lazy weight, or a
    sparse one.
    """
    if torch.compiler.is_compiling():
        return ()
    kept = (
        is_lazy(t) or t.layout != torch.strided or t.is_contiguous() or is_sharded(t)
        for t in tensors
    )
    orders = tuple(
        None if keep else _order(t.shape, t.stride()) for t, keep in zip(tensors, kept, strict=True)
    )
    return orders if any(orders) else ()


@lru_cache(maxsize=1024)
def _order(shape: torch.Size, strides: tuple[int, ...]) -> Order:
    order = tuple(sorted(range(len(shape)), key=lambda d: -strides[d]))
    expected = 1
    for d in reversed(order):
        if shape[d] != 1 and strides[d] != expected:
            return None
        expected *= shape[d]
    return order


def ordered(tensors: list[Tensor], orders: Orders) -> list[Tensor]:
    """Views in the order of memory; the list itself without orders."""
    return (
        [t if o is None else t.permute(o) for t, o in zip(tensors, orders, strict=True)]
        if orders
        else tensors
    )


def dense(tensors: list[Tensor], orders: Orders) -> list[Tensor]:
    """As ``ordered``, but what is laid out otherwise is copied: for gradients, which nothing is
    written to.
    """
    return [t.contiguous() for t in ordered(tensors, orders)] if orders else tensors


def unordered(tensor: Tensor, shape: torch.Size, order: Order) -> Tensor:
    """Elements [numel] in the order of memory as a view of ``shape``."""
    if order is None:
        return tensor.view(shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.view([shape[d] for d in order]).permute(back)


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory, row after row: itself or a copy.

    A zero tensor of torch's, as forward-mode derivatives are made of, has no memory; a negated view
    holds its values with the other sign. The compiler is left to see to both. What is not dense is
    left to the op, which refuses it by name.
    """
    if tensor.layout != torch.strided:
        return tensor
    if torch.compiler.is_compiling():
        return tensor.contiguous()
    if torch._is_zerotensor(tensor):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous().resolve_neg()
