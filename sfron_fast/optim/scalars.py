"""Settings that are tensors: the device reads them, so no step waits for them or is compiled or
captured anew.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# in the order of the ops' ``numbers``; the values are what an op is given beside those
NAMES = {"lr": 0.0, "weight_decay": 0.0, "slow_lr": 1.0}


def on_device(settings: dict[str, float | Tensor], device: torch.device) -> Tensor | None:
    """``settings`` in one tensor, fp64 [settings], if one of them is a tensor; else None.

    Raises:
        RuntimeError: under graph capture, a tensor on another device, which a replay could not
            follow.
    """
    if not any(isinstance(value, Tensor) for value in settings.values()):
        return None
    return torch.stack([_scalar(name, value, device) for name, value in settings.items()])


def _scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float64, device=device)
    if value.device != device and capturing(device):
        raise RuntimeError(
            f"{name}: expected a tensor on {device} while a graph is captured, found one on "
            f"{value.device}; make it there"
        )
    return value.detach().reshape(()).to(device, torch.float64, non_blocking=True)


def moves_slowly(group: dict[str, Any]) -> bool:
    """Whether a group keeps slow weights; a tensor is not read, so it always does."""
    return isinstance(group["slow_lr"], Tensor) or group["slow_lr"] < 1.0


def is_zero(value: float | Tensor) -> bool:
    """Whether a setting is known to be 0 without waiting for a device."""
    return (not isinstance(value, Tensor) or value.device.type == "cpu") and bool(value == 0.0)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there."""
    return (
        device.type == "cuda"
        and not torch.compiler.is_compiling()
        and torch.cuda.is_current_stream_capturing()
    )


def check_capture(groups: list[dict[str, Any]], devices: Iterable[torch.device]) -> None:
    """As torch: a graph is captured of an optimizer that was told so.

    Raises:
        RuntimeError: one that was not, or whose slow weights are in another memory.
    """
    if not any(map(capturing, devices)):
        return
    if any(group["slow_device"] and moves_slowly(group) for group in groups):
        raise RuntimeError(
            "slow_device: expected None in every group while a graph is captured, found 'cpu'; keep"
            " slow weights on the device, or capture forward and backward only"
        )
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(
            "capturable: expected True in every group while a graph is captured, found False; set"
            " it, and give what changes between replays as tensors on the device"
        )
