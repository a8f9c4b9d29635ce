"""What an entry of a parameter's state is: which dtype it is made in, and what it holds."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..ops.lists import zeroed

FORGET = "forget_"  # begins the keys of the moments that forget steps have for themselves


class StateKind(NamedTuple):
    """A rule declares one for each key of its state."""

    dtype: torch.dtype | None = None  # None = the parameter's
    # A moment and a slow weight are shaped like the parameter; a count is one number, fp32 [].
    # The moments of a parameter are of one dtype, a slow weight is of the parameter's.
    role: Literal["moment", "slow", "count"] = "moment"


SLOW = StateKind(role="slow")
COUNT = StateKind(torch.float32, "count")


def prefix(group: dict[str, Any], *, forget: bool) -> str:
    """What the keys of the moments begin with in a forget or a retain step."""
    return FORGET if forget and group["moments"] == "separate" else ""


def zero_state(param: Tensor, kind: StateKind) -> Tensor:
    """A parameter's new state: [] for a count, else shaped and strided like the parameter."""
    dtype = kind.dtype or param.dtype
    if kind.role == "count":
        return torch.zeros((), dtype=dtype, device=param.device)
    return zeroed(torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format))
