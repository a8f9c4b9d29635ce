"""A stand-in for a device with a memory of its own: slow weights of a group with ``slow_device``
count as elsewhere, and copies happen as late as their lane lets them.
"""

import torch

from sfron_fast.optim import elsewhere
from sfron_fast.optim.elsewhere import Lane
from sfron_fast.optim.state_kind import StateKind


class LateLane(Lane):
    """The device does at once what it is given. A copy reads at the first ``join`` after it; what
    it writes the host sees after ``settle``, and the device after ``join``.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.waiting: list[list[torch.Tensor]] = []
        self.busy: set[int] = set()

    def copy(self, target, source):
        self.waiting.append([target, source])

    def join(self):
        rooms = {room.untyped_storage().data_ptr() for room in self.rooms}
        if any(target.untyped_storage().data_ptr() in rooms for target, _ in self.waiting):
            self.settle()
        for pair in self.waiting:
            pair[1] = pair[1].detach().clone()

    def settle(self):
        for target, source in self.waiting:
            target.copy_(source)
        self.waiting.clear()

    def take(self, room):
        assert room not in self.busy, "a room that a step may still read"
        self.busy.add(room)

    def leave(self, room):
        self.busy.remove(room)


def pretend(patch=setattr) -> None:
    """Slow weights of such groups are away, with ``patch`` such as monkeypatch.setattr."""
    patch(StateKind, "is_away", lambda kind, param: kind.device is not None)
    patch(elsewhere, "Lane", LateLane)
