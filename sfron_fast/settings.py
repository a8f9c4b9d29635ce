"""What the settings of a parameter group may be, and a step's arguments before anything is written."""

from typing import Any

import torch
from torch import Tensor

from .amp import amp_scalar
from .checks import number, require
from .groups import Batch
from .hyper import NAMES, check_capture

FLATTENED = {"_fsdp_flattened": "FullyShardedDataParallel (FSDP1)", "ds_id": "DeepSpeed ZeRO"}
_COUNTS = ("retain_pending", "skipped")  # change from step to step, and are nobody's to set
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
    known = dtype in (None, torch.float32, torch.bfloat16)
    require(known, "state_dtype", "None (the parameter's), torch.float32 or torch.bfloat16", dtype)
    if group["differentiable"]:
        raise RuntimeError("differentiable: expected False (autograd cannot follow a fused step), found True; "
                           "differentiate torch.optim's optimizer")  # fmt: skip
    if group["foreach"] and group["fused"]:
        raise RuntimeError("foreach: expected None or False beside fused=True, found True; choose one")


def check_whole(group: dict[str, Any]) -> None:
    """Masks and states belong to whole parameters, or their DTensors.

    Raises:
        ValueError: a wrapper has flattened the parameters.
    """
    remedy = "shard with fully_shard of torch.distributed.fsdp (FSDP2)"
    for mark, culprit in FLATTENED.items():
        flattened = any(hasattr(p, mark) for p in group["params"])
        require(not flattened, "params", "parameters, or DTensors", f"those of {culprit}", remedy)
    check_names(group)


def check_state_dtype(group: dict[str, Any], params: list[Tensor]) -> None:
    """Raise ValueError for a state of bf16 beside parameters that are neither fp32 nor bf16."""
    if group["state_dtype"] == torch.bfloat16:
        for p in params:
            fits = p.dtype in (torch.float32, torch.bfloat16)
            require(fits, "state_dtype", f"None or torch.float32 beside {p.dtype}", torch.bfloat16)


def check_names(group: dict[str, Any]) -> None:
    """As many parameters as were named; cheap, for every step."""
    names, params = group.get("param_names"), group["params"]
    if names is not None and len(names) != len(params):
        require(False, "params", f"the {len(names)} that were named", f"{len(params)}, as when DeepSpeed ZeRO flattens "
                "them", "shard with fully_shard of torch.distributed.fsdp (FSDP2)")  # fmt: skip


def _value(setting: Any) -> Any:
    """What a setting is compared by: lists are copied, as somebody may change them where they are."""
    return id(setting) if isinstance(setting, Tensor) else tuple(setting) if isinstance(setting, list) else setting


def check_step(optimizer: Any, batches: list[Batch]) -> None:
    """What one op would refuse only after another has written.

    Settings are looked at when they have changed; a tensor among them is the op's to read. Gradients are looked at
    where one op does not see them all before it writes; and where state is made.
    """
    groups = optimizer.param_groups
    check_capture(groups, [batch.params[0].device for batch in batches])
    if torch.compiler.is_compiling() or not batches:
        return
    known = [[_value(g[k]) for k in optimizer.defaults if k not in _COUNTS] for g in groups]
    if known != optimizer._checked:
        for group in groups:
            optimizer._check_group({k: 1.0 if isinstance(v, Tensor) else v for k, v in group.items()})
        optimizer._checked = known
    for batch in batches:  # a model may have been converted since
        check_state_dtype(batch.group, batch.params)
    for name in ("grad_scale", "found_inf"):
        amp_scalar(optimizer, name, batches[0].params[0].device)
    if len(batches) > 1:
        for batch in batches:
            batch.check()
