"""What an optimizer will hold on the device, counted from shapes and settings."""

from typing import Any

from torch import Tensor

from ..ops.layout import local
from .elsewhere import room_sizes
from .state import StatefulOptimizer
from .state_kind import StateKind, is_coded

ALIGNED = 16  # bytes that an entry of a mask begins at a multiple of
PARTS = ("weights", "gradients", "moments", "slow weights", "mask")


def footprint(optimizer: StatefulOptimizer, *, masked: bool | None = None) -> dict[str, int]:
    """Bytes of each of ``PARTS`` between a forget step and the end of its cycle; of a sharded model
    those of this rank.

    Corrections of ``weight_bits`` count as what they correct, scales and step counts as moments;
    of slow weights in the host's memory the rooms they are read through, at the end of a cycle.
    Nothing is allocated: parameters may be on the meta device.

    Args:
        masked: whether there will be a mask over all weights; None = as the optimizer has it.
    """
    found = dict.fromkeys(PARTS, 0)
    for group in optimizer.param_groups:
        kinds = optimizer.cycle_state(group)
        for parameter in group["params"]:
            param = local(parameter)
            found["weights"] += param.numel() * param.element_size()
            found["gradients"] += param.numel() * param.element_size()
            if group["masked"] if masked is None else masked:
                size = -(-param.numel() // 8)
                found["mask"] = -(-found["mask"] // ALIGNED) * ALIGNED + size
            for key, kind in kinds.items():
                if not kind.is_away(param):
                    found[_part(key, kind)] += _bytes(param, kind)
    found["slow weights"] += sum(room_sizes(optimizer))
    return found


def _part(key: str, kind: StateKind) -> str:
    if kind.role == "correction":
        return "slow weights" if key.startswith("slow") else "weights"
    return "slow weights" if kind.role == "slow" else "moments"


def _bytes(param: Tensor, kind: StateKind) -> int:
    dtype: Any = kind.dtype_of(param)
    if kind.role == "scale" and not is_coded(param):
        return 0
    return kind.shape_of(param).numel() * dtype.itemsize
