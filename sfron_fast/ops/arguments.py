"""What the reference kernels demand of their arguments; ``csrc/host/check.h`` demands the same
natively.

Every message names the argument, what was expected and what was found. A check never writes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from .lists import flat_size, is_flat, spread

FLOAT32_MAX = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtypes(param: torch.dtype) -> set[torch.dtype]:
    """The dtypes a moment may have beside a parameter: its own, and fp32; beside fp32 also bf16."""
    return {param, torch.bfloat16 if param == torch.float32 else torch.float32}


def strided(name: str, tensors: Sequence[Tensor], written: bool) -> None:
    """The tensors of a list are dense; and, if ``written``, no element would be written twice."""
    for i, t in enumerate(tensors):
        dense(f"{name}[{i}]", t, written)
    once = len(set(map(id, tensors))) == len(tensors)
    require(once or not written, name, "each tensor once", "one of them twice")


def dense(where: str, t: Any, written: bool) -> None:
    """One of them."""
    require(isinstance(t, Tensor), where, "a tensor", type(t).__name__)
    require(t.layout == torch.strided, where, "a dense tensor", t.layout)
    repeats = any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True))
    require(
        not (written and repeats and t.numel()),
        where,
        "a tensor to write to",
        "an expanded one",
        "clone it",
    )
    require(
        not (written and torch._is_zerotensor(t)),
        where,
        "a tensor to write to",
        "a zero tensor",
        "clone it",
    )


def one_device(*lists: Any) -> None:
    """All tensors of the arguments on one device: for fakes, what a kernel checks otherwise."""
    tensors = [t for item in lists for t in (item if isinstance(item, (list, tuple)) else [item])]
    devices = dict.fromkeys(t.device for t in tensors if isinstance(t, Tensor))
    require(len(devices) < 2, "tensors", "one device", " and ".join(map(str, devices)))


def aligned(
    name: str,
    tensors: Sequence[Tensor],
    like: Sequence[Tensor],
    *,
    state: bool = False,
    optional: bool = False,
) -> None:
    """``tensors[i]`` has the shape, device and dtype of ``like[i]``; a ``state`` may be fp32, or
    bf16 beside fp32.
    """
    if optional and not tensors:
        return
    if is_flat(tensors, like):
        flat_list(name, tensors[0], like, flat_size(like))
        tensors = spread(tensors, like)
    require(len(tensors) == len(like), name, f"{len(like)} tensors", len(tensors))
    for i, (tensor, model) in enumerate(zip(tensors, like, strict=True)):
        where = f"{name}[{i}]"
        require(
            tensor.shape == model.shape, where, f"shape {tuple(model.shape)}", tuple(tensor.shape)
        )
        require(tensor.device == model.device, where, f"device {model.device}", tensor.device)
        allowed = state_dtypes(model.dtype) if state else {model.dtype}
        names = " or ".join(sorted(str(d) for d in allowed))
        require(tensor.dtype in allowed, where, f"dtype {names}", tensor.dtype)


def flat_list(name: str, flat: Tensor, like: Sequence[Tensor], size: int) -> None:
    """One tensor that stands for ``like``: [size], contiguous."""
    expected = f"{len(like)} tensors, or a flat one of shape ({size},)"
    require(flat.shape == (size,), name, expected, f"one of shape {tuple(flat.shape)}")
    require(flat.device == like[0].device, f"{name}[0]", f"device {like[0].device}", flat.device)
    require(flat.is_contiguous(), f"{name}[0]", "a contiguous tensor", f"strides {flat.stride()}")


def floats(name: str, tensors: Sequence[Tensor]) -> None:
    """Each of a floating dtype, and all on one device."""
    for i, tensor in enumerate(tensors):
        where = f"{name}[{i}]"
        require(
            tensor.dtype in FLOATS, where, "float32, bfloat16, float16 or float64", tensor.dtype
        )
        require(
            tensor.device == tensors[0].device, where, f"device {tensors[0].device}", tensor.device
        )


def packed_masks(masks: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Packed bits for each of ``like``; or a flat list."""
    if not masks:
        return
    if is_flat(masks, like):
        flat_list("masks", masks[0], like, flat_size(like) // 8)
        require(masks[0].dtype == torch.uint8, "masks[0]", "packed bits in uint8", masks[0].dtype)
        return
    require(len(masks) == len(like), "masks", f"{len(like)} tensors", len(masks))
    for i, (mask, tensor) in enumerate(zip(masks, like, strict=True)):
        size = (tensor.numel() + 7) // 8
        require(mask.dtype == torch.uint8, f"masks[{i}]", "packed bits in uint8", mask.dtype)
        require(
            mask.dim() == 1 and mask.numel() in (0, size),
            f"masks[{i}]",
            f"{size} bytes for {tensor.numel()} weights (or 0 bytes: no mask)",
            tuple(mask.shape),
        )
        require(mask.device == tensor.device, f"masks[{i}]", f"device {tensor.device}", mask.device)


def scalar_tensors(
    like: Sequence[Tensor], dtype: torch.dtype = torch.float32, /, **scalars: Tensor | None
) -> None:
    """Tensors of one element beside ``like``, or None."""
    for name, scalar in scalars.items():
        if scalar is not None:
            require(scalar.numel() == 1, name, "one element", tuple(scalar.shape))
            require(scalar.dtype == dtype, name, str(dtype).removeprefix("torch."), scalar.dtype)
            require(
                not like or scalar.device == like[0].device,
                name,
                f"device {like[0].device}",
                scalar.device,
            )


def numbers_of(
    numbers: Tensor | None, given: tuple[Any, ...], like: Sequence[Tensor]
) -> tuple[Any, ...]:
    """The numbers ``given``, or those of the tensor where it can be read without waiting for a
    device.
    """
    if numbers is not None:
        shape = (len(given),)
        require(numbers.shape == shape, "numbers", f"shape {shape}", tuple(numbers.shape))
        require(numbers.dtype == torch.float64, "numbers", "dtype torch.float64", numbers.dtype)
        if like:
            require(
                numbers.device == like[0].device,
                "numbers",
                f"device {like[0].device}",
                numbers.device,
            )
        if numbers.device.type == "cpu":
            return tuple(numbers.tolist())
    return given


def in_place(name: str, tensor: Tensor) -> None:
    """Kernels write where they read; a copy would be written and lost."""
    require(tensor.is_contiguous(), name, "a contiguous tensor", f"strides {tensor.stride()}")
