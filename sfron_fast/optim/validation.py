"""What the settings of a parameter group may be, and whose they are: the constructor's, a saved
run's, nobody's.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ..distributed.shards import split_by_rows
from ..errors import integer, number, require
from .scalars import NAMES

Moments = Literal["shared", "separate", "none"]
MaskSemantics = Literal["gradient", "update"]
WeightBits = Literal[24, 32] | None
SlowDevice = Literal["cpu"] | None
SCHEDULED = ("forget_lr", "slow_lr")  # a run may change them on its way, as it does lr
FORGETTING = (
    "masked",
    "max_norm",
    "clip_retain",
    "retain_steps",
    "moments",
    "mask_semantics",
    "state_dtype",
    "weight_bits",
)
# where a run is; the optimizer writes it, and it is nobody's to set
COUNTS = {"mask_digest": None, "retain_pending": 0, "skipped": 0, "has_forgotten": False}
CHOICES = {
    "moments": ("shared", "separate", "none"),
    "mask_semantics": ("gradient", "update"),
    "masked": (True, False),
    "clip_retain": (True, False),
    "foreach": (None, True, False),
    "fused": (None, True, False),
    "weight_bits": (None, 24, 32),
    "slow_device": (None, "cpu"),
}


def check_settings(group: dict[str, Any]) -> None:
    """Those that SFRonSGD and SFRonAdamW share.

    Raises:
        ValueError: naming the setting.
        RuntimeError: where torch.optim raises it: flags that exclude each other.
    """
    check_tensor_settings(group)
    for name in ("lr", "weight_decay"):
        number(name, group[name], 0.0)
    if group["forget_lr"] is not None:
        number("forget_lr", group["forget_lr"], 0.0)
    if group["max_norm"] is not None:
        number("max_norm", group["max_norm"], 0.0, open_low=True)
    number("slow_lr", group["slow_lr"], 0.0, 1.0, open_low=True)
    integer("retain_steps", group["retain_steps"], 1)
    for name, choices in CHOICES.items():
        # the constructor's defaults are looked at before ``masked`` is among them
        if name in group:
            value = group[name]
            require(value in choices, name, " or ".join(map(repr, choices)), repr(value))
    check_state_dtype(group["state_dtype"])
    if group["differentiable"]:
        raise RuntimeError(
            "differentiable: expected False (autograd cannot follow a fused step), found True; "
            "differentiate torch.optim's optimizer"
        )
    if group["foreach"] and group["fused"]:
        raise RuntimeError(
            "foreach: expected None or False beside fused=True, found True; choose one"
        )


def check_state_dtype(dtype: Any) -> None:
    """Raise ValueError unless moments can be kept in it."""
    known = dtype in (None, torch.float32, torch.bfloat16, torch.int8)
    names = "None (the parameter's), torch.float32, torch.bfloat16 or torch.int8"
    require(known, "state_dtype", names, dtype)


def check_tensor_settings(group: dict[str, Any]) -> None:
    """Raise ValueError for a tensor of several elements; none is read."""
    for name in (*NAMES, "forget_lr"):
        value = group[name]
        if isinstance(value, Tensor):
            require(
                value.numel() == 1,
                name,
                "a number or a tensor of one element",
                f"shape {tuple(value.shape)}",
                f"Tensor {name} must be 1-element",
            )


def own_group(given: dict[str, Any]) -> dict[str, Any]:
    """A group as the user gave it, in a dict that torch may fill with defaults.

    In the user's own they would count as given when it makes another optimizer, and replace what
    that one's constructor is told.

    Raises:
        ValueError: a group of another optimizer's ``param_groups``, which is filled already.
    """
    filled = [name for name in COUNTS if name in given]
    require(
        not filled,
        "params",
        "groups with what differs in them from the constructor's settings",
        f"one of another optimizer's param_groups ({', '.join(filled)} in it), with all of its"
        " settings",
        "pass {'params': ..., ...} with what is to differ",
    )
    if isinstance(given.get("params"), Iterator):
        given["params"] = list(given["params"])  # as torch does: the user's dict can be used again
    return plain_numbers(given)


def plain_numbers(group: dict[str, Any]) -> dict[str, Any]:
    """A copy with Python's numbers in place of numpy's, which torch.load refuses with
    ``weights_only``.
    """
    return {
        name: (
            type(value)(map(_plain, value))
            if name == "betas" and type(value) in (tuple, list)
            else _plain(value)
        )
        for name, value in group.items()
    }


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and not isinstance(value, Tensor) else value


def loaded_group(mine: dict[str, Any], saved: dict[str, Any], begun: bool) -> dict[str, Any]:
    """The settings of a group when a state is loaded.

    The saved ones, and this optimizer's where none are saved; where slow weights lie is its own.

    In a state of a run that has not ``begun`` to forget, nobody has chosen settings for it: they
    stay this optimizer's.

    Raises:
        ValueError: the run has, with other ones than this optimizer's; those that schedules move
            are the run's.
    """
    saved = {name: value for name, value in saved.items() if name != "slow_device"}
    if not begun:
        saved = {
            name: value for name, value in saved.items() if name not in (*FORGETTING, *SCHEDULED)
        }
    differ = [name for name in FORGETTING if name in saved and saved[name] != mine[name]]
    theirs, ours = (
        ", ".join(f"{name} {group[name]!r}" for name in differ) for group in (saved, mine)
    )
    require(
        not differ,
        "state_dict",
        f"a run with this optimizer's settings ({ours})",
        f"one with {theirs}",
        "make the optimizer with those to go on, or delete them from the param_groups to load",
    )
    return {
        **{name: value for name, value in mine.items() if name not in ("params", "param_names")},
        **saved,
    }


def check_phase(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError unless saved groups are all at the same place, and it is one of a cycle."""
    places = [integer("retain_pending", group["retain_pending"], 0) for group in groups]
    steps = groups[0]["retain_steps"]
    require(
        len(set(places)) == 1 and places[0] <= steps,
        "retain_pending",
        f"one number from 0 to {steps} (retain_steps) in all groups",
        places,
    )


def check_dtypes(group: dict[str, Any], params: list[Tensor]) -> None:
    """Raise ValueError for parameters that ``state_dtype`` or ``weight_bits`` is not for."""
    dtype, bits = group["state_dtype"], group["weight_bits"]
    for p in params if dtype == torch.bfloat16 else ():
        fits = p.dtype in (torch.float32, torch.bfloat16)
        require(fits, "state_dtype", f"None or torch.float32 beside {p.dtype}", torch.bfloat16)
    for p in params if dtype == torch.int8 else ():
        known = p.dtype in (torch.float32, torch.bfloat16, torch.float16)
        require(known, "state_dtype", f"None beside {p.dtype}", dtype)
        require(
            split_by_rows(p),
            "state_dtype",
            "torch.int8 beside parameters that are sharded along their first dimension, if at all",
            "another placement",
            "use torch.bfloat16 or torch.float32 there",
        )
    for p in params if bits is not None else ():
        require(
            p.dtype == torch.bfloat16,
            "weight_bits",
            f"None beside parameters of {p.dtype}",
            bits,
            "parameters of bf16 have more bits; put the others in a group of their own",
        )


def check_names(group: dict[str, Any]) -> None:
    """As many parameters as were named; cheap, for every step."""
    names, params = group.get("param_names"), group["params"]
    if names is not None and len(names) != len(params):
        require(
            False,
            "params",
            f"the {len(names)} that were named",
            f"{len(params)}, as when DeepSpeed ZeRO flattens them",
            "shard with fully_shard of torch.distributed.fsdp (FSDP2)",
        )
