"""What the ops over a language model's head demand of their arguments, and how they take them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from .arguments import FLOATS
from .layout import in_memory, is_sharded
from .rows import transformed


def check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden [rows, features], weight [classes, features], bias [classes]: one dtype and device."""
    name = f"{prefix}hidden"
    require(hidden.dim() == 2, name, "[rows, features]", tuple(hidden.shape), "flatten it")
    some = "float32, bfloat16, float16 or float64"
    require(hidden.dtype in FLOATS, name, some, hidden.dtype)
    features = hidden.shape[1]
    right = weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == features
    require(right, f"{prefix}weight", f"[classes, {features}]", tuple(weight.shape))
    if bias is not None:
        wanted = tuple(weight.shape[:1])
        require(bias.shape == wanted, f"{prefix}bias", f"shape {wanted}", tuple(bias.shape))
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require(
                tensor.dtype == hidden.dtype,
                f"{prefix}{part}",
                f"dtype {hidden.dtype} as of {name}",
                tensor.dtype,
                "convert one, or call under torch.autocast",
            )
            device = hidden.device
            require(tensor.device == device, f"{prefix}{part}", f"device {device}", tensor.device)


def check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> None:
    """What the ops over a head demand of what they share; raises ValueError."""
    check_head("", hidden, weight, bias)
    shape = tuple(hidden.shape[:1])
    require(labels.shape == shape, "labels", f"shape {shape}", tuple(labels.shape))
    require(labels.dtype == torch.int64, "labels", "int64", labels.dtype)
    require(labels.device == hidden.device, "labels", f"device {hidden.device}", labels.device)
    if softcap is not None:
        number("softcap", softcap, 0.0, open_low=True)
    number("logit_scale", logit_scale, -torch.inf)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        classes = weight.shape[0]
        outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if outside.numel():
            expected = f"classes 0 to {classes - 1} or {ignore_index}"
            require(False, "labels", expected, int(outside[0]))


def prepared(hidden: Tensor, *others: Tensor | None, teacher: str = "") -> tuple[Any, ...]:
    """hidden, weight, bias as the ops take them: no DTensor; under autocast as it casts a linear
    layer's.
    """
    for name, tensor in zip(("hidden", "weight", "bias"), (hidden, *others), strict=False):
        require(
            tensor is None or not is_sharded(tensor),
            f"{teacher}{name}",
            "a plain tensor",
            "a DTensor",
            "call within the forward pass of the module that owns the head, where FSDP2 gathers "
            "its weights",
        )
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in (hidden, *others))


def given(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Any, ...]:
    """``prepared``, and as the schemas have them: tensors with values of their own, floats."""
    hidden, weight, bias = prepared(hidden, weight, bias)
    return (
        in_memory(hidden),
        in_memory(weight),
        in_memory(labels),
        None if bias is None else in_memory(bias),
        None if softcap is None else float(softcap),
        float(logit_scale),
        ignore_index,
    )


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Like hidden, weight and bias, for torch.compile; of no elements where not needed."""
    first, second, third = (
        hidden.new_empty(0) if t is None or not need else torch.empty_like(t)
        for t, need in zip((hidden, weight, bias), needed, strict=True)
    )
    return first, second, third


def derived(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients that are needed, which can be differentiated again."""
    some = [t for t, need in zip(sources, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(outputs, some, grads, create_graph=True))
    return [next(found) if need else None for need in needed]
