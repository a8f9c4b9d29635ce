"""Labels that are classes: a look at them, for an error that says which there are."""

from typing import Any

import torch
from torch import Tensor

from ..errors import require

IGNORED = -100  # the label that F.cross_entropy leaves out


def check_labels(outputs: Tensor, targets: Tensor) -> None:
    """A label that is no class, before it reaches a kernel; on other devices the loss itself
    objects.
    """
    if targets.device.type != "cpu" or not targets.numel():
        return
    low, high = int(targets.min()), int(targets.max())
    last = outputs.shape[1] - 1
    require(low >= 0 and high <= last, "targets", f"classes 0 to {last}", f"{low} to {high}")


def check_counted(outputs: Any, targets: Tensor) -> None:
    """``check_labels`` of those F.cross_entropy counts, for outputs [samples, classes, ...]."""
    labelled = isinstance(outputs, Tensor) and outputs.dim() > 1 and targets.dtype == torch.int64
    if labelled and targets.shape[1:] == outputs.shape[2:]:
        check_labels(outputs, targets[targets != IGNORED])
