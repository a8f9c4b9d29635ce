"""What the ops over a language model's head demand of their arguments, and how they take them."""

from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from .arguments import FLOATS
from .layout import is_sharded
from .rows import transformed


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
    require(hidden.dim() == 2, "hidden", "[rows, features]", tuple(hidden.shape), "flatten it")
    some = "float32, bfloat16, float16 or float64"
    require(hidden.dtype in FLOATS, "hidden", some, hidden.dtype)
    shape = (hidden.shape[1],)
    require(
        weight.dim() == 2 and weight.shape[1:] == shape and weight.shape[0] > 0,
        "weight",
        f"[classes, {hidden.shape[1]}]",
        tuple(weight.shape),
    )
    others = [("weight", weight), *([] if bias is None else [("bias", bias)])]
    for name, tensor in others:
        require(
            tensor.dtype == hidden.dtype,
            name,
            f"dtype {hidden.dtype} as of hidden",
            tensor.dtype,
            "convert one, or call under torch.autocast",
        )
    if bias is not None:
        wanted = tuple(weight.shape[:1])
        require(bias.shape == wanted, "bias", f"shape {wanted}", tuple(bias.shape))
    require(
        labels.shape == hidden.shape[:1],
        "labels",
        f"shape {tuple(hidden.shape[:1])}",
        tuple(labels.shape),
    )
    require(labels.dtype == torch.int64, "labels", "int64", labels.dtype)
    for name, tensor in (*others, ("labels", labels)):
        device = hidden.device
        require(tensor.device == device, name, f"device {device}", tensor.device)
    if softcap is not None:
        number("softcap", softcap, 0.0, open_low=True)
    number("logit_scale", logit_scale, -torch.inf)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        classes = weight.shape[0]
        outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if outside.numel():
            expected = f"classes 0 to {classes - 1} or {ignore_index}"
            require(False, "labels", expected, int(outside[0]))


def prepared(hidden: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """hidden, weight, bias as the ops take them: no DTensor; under autocast as it casts a linear
    layer's.
    """
    for name, tensor in zip(("hidden", "weight", "bias"), (hidden, *others), strict=False):
        require(
            tensor is None or not is_sharded(tensor),
            name,
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
