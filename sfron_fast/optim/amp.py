"""Automatic mixed precision: what ``torch.amp.GradScaler`` needs to run a forget step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import require


class ForgetView:
    """An optimizer seen through its forget phase: ``scaler.step(optimizer.forget)`` calls
    ``forget_step``.

    GradScaler knows one method, ``step``, and keeps what it found about an optimizer under its
    identity, so there is one such object per optimizer. All but ``step`` is the optimizer's own.
    """

    def __init__(self, optimizer: Any) -> None:
        object.__setattr__(self, "_optimizer", optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_optimizer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's ``forget_step``."""
        return self._optimizer.forget_step(closure)


def amp_scalar(optimizer: Any, name: str, device: torch.device) -> Tensor | None:
    """``grad_scale`` or ``found_inf``, if set: GradScaler sets them for a fused step and deletes
    them after it.
    """
    scalar = getattr(optimizer, name, None)
    if scalar is None:
        return None
    if not (isinstance(scalar, Tensor) and scalar.dtype == torch.float32 and scalar.numel() == 1):
        found = repr(scalar)  # waits for the device
        require(False, name, "a float32 tensor of one element, or None", found)
    return scalar.to(device)
