"""What an entry of a parameter's state is: which dtype it is made in, and what it holds."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..distributed.shards import sharded_like
from ..ops.layout import local, ordered, orders_of
from ..ops.lists import zeroed
from ..ops.moment_codes import SIGNED, UNSIGNED, has_codes, scales_shape
from ..ops.split_weights import CORRECTIONS

FORGET = "forget_"  # begins the keys of the moments that forget steps have for themselves


class StateKind(NamedTuple):
    """A rule declares one for each key of its state."""

    dtype: torch.dtype | None = None  # None = the parameter's; int8 and uint8 = codes, or fp32
    # A moment, a slow weight and a correction are shaped like the parameter; a count is one number,
    # fp32 []; scales are fp32 [first dimension, groups, moments], where moments are codes.
    # The moments of a parameter are of one dtype, a slow weight is of the parameter's.
    role: Literal["moment", "slow", "correction", "count", "scale"] = "moment"
    moments: int = 1  # that scales are for
    device: str | None = None  # a type of device; None = the parameter's

    def dtype_of(self, param: Tensor) -> torch.dtype:
        """Beside this parameter."""
        if self.role == "moment" and self.dtype in CODES and not is_coded(param):
            return torch.float32
        return self.dtype or param.dtype

    def is_away(self, param: Tensor) -> bool:
        """Whether it lies in another memory than the parameter."""
        return self.device is not None and self.device != param.device.type

    def device_of(self, param: Tensor) -> torch.device:
        """Where it lies."""
        return torch.device(self.device) if self.device and self.is_away(param) else param.device

    def shape_of(self, param: Tensor) -> torch.Size:
        """Beside this parameter."""
        if self.role == "count":
            return torch.Size()
        if self.role == "scale":
            return torch.Size(scales_shape(in_order(param), self.moments))
        return param.shape


CODES = (SIGNED, UNSIGNED)
COUNT = StateKind(torch.float32, "count")


def in_order(param: Tensor) -> Tensor:
    """A view with the dimensions in the order of memory, as the ops take it."""
    return ordered([param], orders_of([param]))[0]


def is_coded(param: Tensor) -> bool:
    """Whether its moments are codes where ``state_dtype`` is int8."""
    return has_codes(in_order(param))


def has_counts(group: dict[str, Any]) -> bool:
    """Whether something is dithered, by a count of the updates."""
    return group["weight_bits"] is not None or group["state_dtype"] == SIGNED


def moment_kinds(
    group: dict[str, Any], first: str, square: str | None = None
) -> dict[str, StateKind]:
    """A moment and its square by key, and their scales if they are codes."""
    dtype = group["state_dtype"]
    if dtype == SIGNED:
        kinds = {first: StateKind(SIGNED)} | ({square: StateKind(UNSIGNED)} if square else {})
        return {**kinds, "scales": StateKind(torch.float32, "scale", len(kinds))}
    # of a weight in two pieces the parameter is only one
    kind = StateKind(torch.float32 if dtype is None and group["weight_bits"] else dtype)
    return {first: kind} | ({square: kind} if square else {})


def correction_kind(group: dict[str, Any]) -> StateKind:
    """Of a group with ``weight_bits``."""
    return StateKind(CORRECTIONS[group["weight_bits"]], "correction")


def slow_kinds(group: dict[str, Any]) -> dict[str, StateKind]:
    """Slow weights by key, and their corrections if there are any."""
    device = group["slow_device"]
    kinds = {"slow": StateKind(role="slow", device=device)}
    if group["weight_bits"] is not None:
        kinds["slow_correction"] = correction_kind(group)._replace(device=device)
    return kinds


def prefix(group: dict[str, Any], *, forget: bool) -> str:
    """What the keys of the moments begin with in a forget or a retain step."""
    return FORGET if forget and group["moments"] == "separate" else ""


def zero_state(param: Tensor, kind: StateKind) -> Tensor:
    """A parameter's new state: [] for a count, else shaped and strided like the parameter, but for
    scales.
    """
    dtype = kind.dtype_of(param)
    if kind.role == "count":
        return torch.zeros((), dtype=dtype, device=param.device)
    if kind.role == "scale":
        shape = kind.shape_of(local(param))
        return sharded_like(param, torch.zeros(shape, device=param.device), kind.shape_of(param))
    like: dict[str, Any] = {"dtype": dtype, "memory_format": torch.preserve_format}
    if kind.is_away(param):
        like |= {"device": kind.device_of(param), "pin_memory": param.device.type == "cuda"}
    return zeroed(torch.empty_like(param, **like))
