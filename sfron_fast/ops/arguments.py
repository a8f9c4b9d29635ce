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
from .moment_codes import has_codes, scales_shape
from .split_weights import CORRECTIONS

FLOAT32_MAX = torch.finfo(torch.float32).max
# as csrc/host/lists.h says
PACKED = "packed bits in uint8, as functional.pack_bits makes them of bool"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtypes(param: torch.dtype) -> set[torch.dtype]:
    """The dtypes a moment may have beside a parameter: its own, and fp32; beside fp32 also bf16."""
    return {param, torch.bfloat16 if param == torch.float32 else torch.float32}


def strided(name: str, tensors: Sequence[Tensor], written: bool) -> None:
    """The tensors of a list are dense; and, if ``written``, no element would be written twice."""
    for i, t in enumerate(tensors):
        dense(f"{name}[{i}]", t, written)
    filled = [id(t) for t in tensors if t.numel()]
    once = len(set(filled)) == len(filled)
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
    dtypes: Sequence[set[torch.dtype]] | None = None,
) -> None:
    """``tensors[i]`` has the shape, device and dtype of ``like[i]``, or one of ``dtypes[i]``; a
    ``state`` may be fp32, or bf16 beside fp32.
    """
    if optional and not tensors:
        return
    if dtypes is None:
        dtypes = [state_dtypes(t.dtype) if state else {t.dtype} for t in like]
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
        names = " or ".join(sorted(str(d) for d in dtypes[i]))
        require(tensor.dtype in dtypes[i], where, f"dtype {names}", tensor.dtype)


def step_counts(
    steps: Sequence[Tensor], params: Sequence[Tensor], *, optional: bool = False
) -> None:
    """The updates of each parameter, fp32 []; or a flat list."""
    if optional and not steps:
        return
    if is_flat(steps, params):
        flat_list("steps", steps[0], params, len(params))
        require(steps[0].dtype == torch.float32, "steps[0]", "float32", steps[0].dtype)
    else:
        require(len(steps) == len(params), "steps", f"{len(params)} tensors", len(steps))
        scalar_tensors(params, **{f"steps[{i}]": step for i, step in enumerate(steps)})


def correction_lists(
    params: Sequence[Tensor],
    corrections: Sequence[Tensor],
    **slow: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> None:
    """Of bf16 parameters, int8 or int16; of slow weights by name, the same where there are any."""
    known = set(CORRECTIONS.values())
    aligned("corrections", corrections, params, optional=True, dtypes=[known] * len(params))
    for i, param in enumerate(params if corrections else ()):
        require(
            param.dtype == torch.bfloat16,
            f"params[{i}]",
            "torch.bfloat16 beside corrections",
            param.dtype,
        )
    own = [{c.dtype} for c in spread(corrections, params)]
    for name, (weights, pieces) in slow.items():
        wanted = len(params) if weights and corrections else 0
        found = len(params) if is_flat(pieces, params) else len(pieces)
        require(found == wanted, name, f"{wanted} tensors", found)
        aligned(name, pieces, params, optional=True, dtypes=own)


def coded_moments(
    params: Sequence[Tensor],
    scales: Sequence[Tensor],
    moments: dict[str, tuple[Sequence[Tensor], torch.dtype]],
    *,
    optional: bool = False,
) -> None:
    """Moments by name beside the dtype of their codes. Where a scale has elements they are codes,
    and else what ``aligned`` allows.
    """
    require(
        len(scales) in (0, len(params)), "scales", f"{len(params)} tensors or none", len(scales)
    )
    coded = [bool(scales) and scales[i].numel() > 0 for i in range(len(params))]
    for i, param in enumerate(params):
        if not coded[i]:
            continue
        require(
            param.dtype != torch.float64,
            f"params[{i}]",
            "float32, bfloat16 or float16 beside codes",
            param.dtype,
        )
        where = f"scales[{i}]"
        rows = f"rows of a multiple of 32 elements beside codes, not {tuple(param.shape)}"
        require(has_codes(param), where, rows, "a scale")
        shape = scales_shape(param, len(moments))
        require(scales[i].shape == shape, where, f"shape {shape}", tuple(scales[i].shape))
        require(scales[i].dtype == torch.float32, where, "float32", scales[i].dtype)
        require(scales[i].device == param.device, where, f"device {param.device}", scales[i].device)
    for name, (states, code) in moments.items():
        dtypes = [
            {code} if c else state_dtypes(p.dtype) for p, c in zip(params, coded, strict=True)
        ]
        aligned(name, states, params, optional=optional, dtypes=dtypes)


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
        require(masks[0].dtype == torch.uint8, "masks[0]", PACKED, masks[0].dtype)
        return
    require(len(masks) == len(like), "masks", f"{len(like)} tensors", len(masks))
    for i, (mask, tensor) in enumerate(zip(masks, like, strict=True)):
        size = (tensor.numel() + 7) // 8
        require(mask.dtype == torch.uint8, f"masks[{i}]", PACKED, mask.dtype)
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
            dense(name, scalar, False)
            require(scalar.numel() == 1, name, "one element", tuple(scalar.shape))
            require(scalar.dtype == dtype, name, str(dtype).removeprefix("torch."), scalar.dtype)
            for tensor in like[:1]:
                same = scalar.device == tensor.device
                require(same, name, f"device {tensor.device}", scalar.device)


def numbers_of(
    numbers: Tensor | None, given: tuple[Any, ...], like: Sequence[Tensor]
) -> tuple[Any, ...]:
    """The numbers ``given``, or those of the tensor where it can be read without waiting for a
    device.
    """
    if numbers is not None:
        dense("numbers", numbers, False)
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
