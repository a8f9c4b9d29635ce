"""Steps that changed nothing, as a gradient was not finite: counted on the device; told of where
all are so.
"""

import warnings

import torch
from torch import Tensor

from .scalars import capturing

ENOUGH = 20  # in a row; a GradScaler that begins too high needs as many at most


class Skips:
    """One counter per device, int64 []: the kernels count there, and no step waits for them."""

    def __init__(self) -> None:
        self._counters: dict[torch.device, Tensor] = {}
        self._known: dict[torch.device, int] = {}
        self._steps, self._told = 0, False
        self._copies: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def counter(self, device: torch.device) -> Tensor:
        """The one beside the parameters."""
        counter = self._counters.get(device)
        if counter is None:
            counter = self._counters[device] = torch.zeros((), dtype=torch.int64, device=device)
        return counter

    def take(self) -> int:
        """Steps skipped since the last call. Waits for the device."""
        now = {device: int(counter) for device, counter in self._counters.items()}
        before, self._known = self._known, now
        return sum(count - before.get(device, 0) for device, count in now.items())

    def watch(self, device: torch.device) -> None:
        """To be called in every step that may be skipped; warns (RuntimeWarning), once, if
        ``ENOUGH`` in a row were.

        On a GPU it looks at a copy that has arrived, so the word comes later. Not within
        torch.compile or a graph.
        """
        if self._told or torch.compiler.is_compiling() or capturing(device):
            return
        self._steps += 1
        if self._steps % ENOUGH:
            return
        copy = self.counter(device).to("cpu", copy=True, non_blocking=True)
        event = torch.cuda.Event() if device.type == "cuda" else None
        if event is not None:
            event.record(torch.cuda.current_stream(device))
        self._copies = [*self._copies[-3:], (copy, event)]
        there = [0, *(int(copy) for copy, event in self._copies if event is None or event.query())]
        if len(there) > 1 and there[-1] - there[-2] == ENOUGH:
            self._told = True
            warnings.warn(
                f"the last {ENOUGH} steps changed nothing: their gradients were not finite, or"
                " found_inf was set; look for inf and NaN in the weights, the data and the loss"
                " (optimizer.skipped_steps counts such steps)",
                RuntimeWarning,
                stacklevel=2,
            )
