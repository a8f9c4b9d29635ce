"""Slow weights in the host's memory (``slow_device="cpu"``): written as a cycle starts, read as it
ends.

Copies go in a lane beside the device's own work. Out: the lane waits for the weights, and the
forget step, which overwrites them, for the lane. In: part by part, through two rooms on the device;
a step takes one while the next arrives. All at once would hold what is to be saved.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # streams stay out of a compiled step

from ..ops.layout import local
from .batch import Batch
from .scalars import moves_slowly
from .state import StatefulOptimizer
from .state_kind import slow_kinds

PART = 1 << 26  # bytes; a larger parameter is a part of its own
ALIGNED = 256  # bytes that a tensor begins at a multiple of

Brought = tuple[Batch, list[Tensor], list[Tensor]]  # slow weights, and their corrections


class Lane:
    """Copies between a device and the host, in their order; here each is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rooms: list[Tensor] = []
        self.turn = 0

    def fork(self) -> None:
        """Copies from now on wait for what the device was given so far."""

    def join(self) -> None:
        """What the device is given from now on waits for the copies so far."""

    def settle(self) -> None:
        """The host waits for the copies so far."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """One more."""
        target.copy_(source)

    def take(self, room: int) -> None:
        """Copies from now on wait until the room was left."""

    def leave(self, room: int) -> None:
        """It is free after what the device was given so far."""

    @_disable_dynamo
    def make_rooms(self, sizes: list[int]) -> None:
        """Of so many bytes, the largest first."""
        self.rooms = [torch.empty(n, dtype=torch.uint8, device=self.device) for n in sizes]
        self.fork()  # the memory may have been somebody else's

    @_disable_dynamo
    def bring(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies on the device, good until ``done`` and the ``bring`` after the next."""
        if sum(_padded(tensor.nbytes) for tensor in tensors) > self.rooms[self.turn].numel():
            self.turn = 0
        self.take(self.turn)
        found, start = [], 0
        for tensor in tensors:
            place = self.rooms[self.turn][start : start + tensor.nbytes]
            found.append(place.view(tensor.dtype).view(tensor.shape))
            self.copy(found[-1], tensor)
            start += _padded(tensor.nbytes)
        self.join()
        return found

    @_disable_dynamo
    def done(self) -> None:
        """The device was given all that reads what was brought last."""
        self.leave(self.turn)
        self.turn = 1 - self.turn


class CudaLane(Lane):
    """A stream of its own; the host waits for it in ``settle`` only. Not yet run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.left: dict[int, torch.cuda.Event] = {}

    def fork(self) -> None:
        """The stream waits for the current one."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def join(self) -> None:
        """The current one waits for the stream."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def settle(self) -> None:
        """The host waits for the stream."""
        self.stream.synchronize()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Beside what the device does; the host's memory is pinned."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def take(self, room: int) -> None:
        """The stream waits for what read the room."""
        if room in self.left:
            self.stream.wait_event(self.left[room])

    def leave(self, room: int) -> None:
        """An event behind what reads it."""
        self.left[room] = torch.cuda.current_stream(self.device).record_event()


def is_away(batch: Batch) -> bool:
    """Whether a batch has slow weights, in another memory than its parameters."""
    return moves_slowly(batch.group) and slow_kinds(batch.group)["slow"].is_away(batch.params[0])


@_disable_dynamo
def keep(optimizer: StatefulOptimizer, batch: Batch) -> None:
    """Slow weights that are away become what the weights are; what comes after may change those."""
    group, lane = batch.group, _lane(optimizer, batch)
    optimizer._corrections(batch)
    kinds = slow_kinds(group)
    for key, kind in kinds.items():
        optimizer._state(batch, key, kind)
    lane.fork()
    for param in batch.params:
        state = optimizer.state[param]
        sources = {"slow": param, "slow_correction": state.get("correction")}
        for key in kinds:
            lane.copy(local(state[key]), local(sources[key]))
    lane.join()


def brought(optimizer: StatefulOptimizer, batch: Batch) -> Iterable[Brought]:
    """A batch, and its slow weights as the ops take them: beside the parameters, if need be part
    by part, each to be used before the next.
    """
    slow, corrections = optimizer._slow(batch), optimizer._slow_corrections(batch)
    if not is_away(batch):
        return [(batch, slow, corrections)]
    return _in_parts(optimizer, batch, [slow, corrections] if corrections else [slow])


def settle(optimizer: StatefulOptimizer) -> None:
    """The host may read what is away, and write there."""
    for lane in optimizer._lanes.values():
        lane.settle()


def room_sizes(optimizer: StatefulOptimizer) -> list[int]:
    """Bytes of the rooms: for the largest parameter, and for parts of several."""
    sizes = [
        _size(local(param), group)
        for group in optimizer.param_groups
        for param in group["params"]
        if moves_slowly(group) and slow_kinds(group)["slow"].is_away(param)
    ]
    part = min(PART, sum(sizes))
    return [max([*sizes, part]), part]


def _size(param: Tensor, group: dict[str, Any]) -> int:
    """Bytes that the slow weights of a parameter take in a room."""
    dtypes: list[Any] = [kind.dtype_of(param) for kind in slow_kinds(group).values()]
    return sum(_padded(param.numel() * dtype.itemsize) for dtype in dtypes)


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _parts(sizes: list[int]) -> Iterator[list[int]]:
    """Neighbours that together take ``PART`` bytes at most, or one."""
    chosen: list[int] = []
    for i, size in enumerate(sizes):
        if chosen and sum(sizes[k] for k in chosen) + size > PART:
            yield chosen
            chosen = []
        chosen.append(i)
    yield chosen


def _lane(optimizer: StatefulOptimizer, batch: Batch) -> Lane:
    device = batch.params[0].device
    if device not in optimizer._lanes:
        optimizer._lanes[device] = (CudaLane if device.type == "cuda" else Lane)(device)
    return optimizer._lanes[device]


def _in_parts(
    optimizer: StatefulOptimizer, batch: Batch, columns: list[list[Tensor]]
) -> Iterator[Brought]:
    columns = [[local(tensor) for tensor in column] for column in columns]
    sizes = [_size(local(param), batch.group) for param in batch.params]
    parts, lane = list(_parts(sizes)), _lane(optimizer, batch)
    needed = max(sum(sizes[i] for i in chosen) for chosen in parts)
    if not lane.rooms or lane.rooms[0].numel() < needed:
        lane.make_rooms(room_sizes(optimizer))
    for chosen in parts:
        there = lane.bring([column[i] for column in columns for i in chosen])
        try:
            yield batch.part(chosen), there[: len(chosen)], there[len(chosen) :]
        finally:
            lane.done()
