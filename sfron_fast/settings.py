"""What the settings of a parameter group may be."""

from typing import Any

import torch
from torch import Tensor

from .checks import number, require
from .hyper import NAMES

CHOICES = {"moments": ("shared", "separate", "none"), "mask_semantics": ("gradient", "update"),
           "foreach": (None, True, False), "fused": (None, True, False)}  # fmt: skip


def check_settings(group: dict[str, Any]) -> None:
    """Those that SFRonSGD and SFRonAdamW share.

    Raises:
        ValueError: naming the setting.
        RuntimeError: where torch.optim raises it: flags that exclude each other.
    """
    for name in (*NAMES, "forget_lr"):
        value = group[name]
        if isinstance(value, Tensor):
            require(value.numel() == 1, name, "a number or a tensor of one element", f"shape {tuple(value.shape)}",
                    f"Tensor {name} must be 1-element")  # fmt: skip
    for name in ("lr", "weight_decay"):
        number(name, group[name], 0.0)
    if group["forget_lr"] is not None:
        number("forget_lr", group["forget_lr"], 0.0)
    if group["max_norm"] is not None:
        number("max_norm", group["max_norm"], 0.0, open_low=True)
    number("slow_lr", group["slow_lr"], 0.0, 1.0, open_low=True)
    steps = group["retain_steps"]
    require(isinstance(steps, int) and steps >= 1, "retain_steps", "an integer >= 1", repr(steps))
    for name, choices in CHOICES.items():
        require(group[name] in choices, name, " or ".join(map(repr, choices)), repr(group[name]))
    dtype = group["state_dtype"]
    require(dtype in (None, torch.float32), "state_dtype", "None (the parameter's) or torch.float32", dtype)
    if group["differentiable"]:
        raise RuntimeError("differentiable: expected False (autograd cannot follow a fused step), found True; "
                           "differentiate torch.optim's optimizer")  # fmt: skip
    if group["foreach"] and group["fused"]:
        raise RuntimeError("foreach: expected None or False beside fused=True, found True; choose one")
