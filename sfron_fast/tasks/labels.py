"""Labels that are classes: a look at them, for an error that says which there are."""

from typing import Any

import torch
import torch.nn.functional as F
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


def checked_cross_entropy(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """F.cross_entropy, which does not say which labels there are, and which classes.

    Raises:
        ValueError: a label that is no class; where labels are not on the CPU, torch's own error.
    """
    try:
        return F.cross_entropy(outputs, targets, reduction=reduction)
    except IndexError:
        check_counted(outputs, targets)
        raise
