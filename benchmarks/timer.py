"""Times arms in turn, a GPU's by its own clock; what disagrees with the first arm is not timed."""

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, cycle
from typing import Any

import torch
from torch import Tensor

from .harness import Arm, Row, difference, make_row, uncounted

Note = Callable[[str, str], None]  # (arm, what happened)


class Clock:
    """Device time of one call on a cold cache, host time, and how many kernels a call launches."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self.flusher = torch.ones(max(4 * cache, 1 << 26) // 4, device=device)
            self.sum = torch.zeros((), device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def flush(self) -> None:
        """Fill the L2 cache by reading: lines written here would be written out later."""
        if self.cuda:
            torch.sum(self.flusher, 0, out=self.sum)

    def device_seconds(self, run: Callable[[], Any]) -> float:
        """Between two events; the host has a head start of one flush, as after a backward pass."""
        self.wait()
        self.flush()
        if not self.cuda:
            uncounted.seconds = 0.0
            start = time.perf_counter()
            run()
            return time.perf_counter() - start - uncounted.seconds
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    def host_seconds(self, run: Callable[[], Any], times: int) -> tuple[float, float]:
        """(until the call returns, until the device is done): medians, nothing queued before."""
        host, wall = [], []
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            run()
            host.append(time.perf_counter() - start)
            self.wait()
            wall.append(time.perf_counter() - start)
        return statistics.median(host), statistics.median(wall)

    def launches(self, run: Callable[[], Any]) -> int:
        """Kernels and copies of one call."""
        activity = torch.profiler.ProfilerActivity
        if not self.cuda:
            return -1
        with torch.profiler.profile(activities=[activity.CUDA]) as seen:
            run()
            self.wait()
        mine = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        # names of ranges
        return sum(not e.name.startswith(("Optimizer.", "ProfilerStep")) for e in mine)

    def peak_mb(self, run: Callable[[], Any]) -> float:
        """What one call allocates at most, beside what is there already."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            self.wait()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        return max(accumulate(cpu_allocations(run), initial=0)) / 2**20


def cpu_allocations(run: Callable[[], Any]) -> list[int]:
    """Bytes that a call takes from torch's CPU allocator or, with a minus, gives back, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent(), torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        run()
    found = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]


class Contest:
    """The arms of one case, timed in turn: all, or some rivals at a time against the same two."""

    def __init__(
        self, case: str, moved: int, clock: Clock, note: Note, least: int = 7, most: int = 100
    ) -> None:
        self.case, self.moved, self.clock, self.note, self.least, self.most = (
            case,
            moved,
            clock,
            note,
            least,
            most,
        )
        # what the first arm that was checked did
        self.wanted: tuple[str, list[Tensor]] | None = None
        self.times: dict[str, list[float]] = {}
        self.measured: dict[str, dict[str, Any]] = {}

    def agreeing(self, arms: list[Arm]) -> list[Arm]:
        """Without those that fail, or disagree with the first arm ever checked."""
        return [arm for arm in arms if arm.check is None or self._agrees(arm, arm.check)]

    def _agrees(self, arm: Arm, check: Callable[[], list[Tensor]]) -> bool:
        try:
            found = check()
            error = 0.0 if self.wanted is None else difference(found, self.wanted[1])
        except Exception as failure:
            self.note(arm.name, f"failed: {first_line(failure)}")
            return False
        if not error <= arm.tolerance:
            self.note(arm.name, f"differs from {self.wanted[0]} by {error:.1e}: not timed")
            return False
        if self.wanted is None:
            self.wanted = arm.name, found
        return True

    def time(self, arms: list[Arm], seconds: float) -> None:
        """Rounds of these arms; then what else is known of each, unless it is known already."""
        for arm in [*arms, *arms]:
            arm.run()
        began, order = time.perf_counter(), turns(arms)
        for rounds in range(self.most if arms else 0):
            if rounds >= self.least and time.perf_counter() - began > seconds:
                break
            for arm in next(order):
                self.times.setdefault(arm.name, []).append(self.clock.device_seconds(arm.run))
        for arm in arms:
            if arm.name not in self.measured:
                self.measured[arm.name] = self._beside(arm)

    def _beside(self, arm: Arm) -> dict[str, Any]:
        """Host time, memory and launches."""
        found: dict[str, Any] = {}
        if self.clock.cuda:
            slow = statistics.median(self.times[arm.name]) > 0.02
            host, wall = self.clock.host_seconds(arm.run, 5 if slow else 15)
            found |= {"host_ms": host * 1e3, "wall_ms": wall * 1e3}
        found["peak_mb"] = self.clock.peak_mb(arm.run)
        try:
            if found.get("host_ms", 0.0) < 50:  # the profiler is slow on long lists
                found["launches"] = self.clock.launches(arm.run)
        except Exception as error:
            self.note(arm.name, f"launches not counted: {first_line(error)}")
        return found

    def rows(self, names: list[str]) -> list[Row]:
        """Of these arms, as far as they were timed."""
        rows = [
            replace(make_row(self.case, name, self.times[name], self.moved), **self.measured[name])
            for name in names
            if name in self.times
        ]
        probe = next((row for row in rows if row.arm.startswith("probe")), None)
        return [replace(row, of_probe=probe.p50_ms / row.p50_ms if probe else 0.0) for row in rows]


def turns(arms: Sequence[Any]) -> Iterator[list[Any]]:
    """Rounds in random order; none begins with what ended the last, whose data are cached."""
    draw, order = random.Random(0), list(arms)
    while True:
        last = order[-1]
        draw.shuffle(order)
        if order[0] is last:
            order.append(order.pop(0)) if len(order) > 2 else order.reverse()
        yield list(order)


def first_line(error: BaseException) -> str:
    said = str(error).strip()
    line = said.splitlines()[0] if said else ""
    return f"{type(error).__name__}: {line}"[:300]


def rotating(
    name: str, step: Callable[[Any], Any], inputs: list[Any], tolerance: float = 1e-3
) -> Arm:
    """``step`` on one input after the other, none found in a cache; the first is checked."""
    turn = cycle(inputs)
    return Arm(name, lambda: step(next(turn)), lambda: step(inputs[0]), tolerance)


# calls before a capture, and before the check of an arm that is compared with a captured one
WARM = 3


def warmed(arm: Arm) -> Arm:
    for _ in range(WARM):
        arm.run()
    return arm


def replayed(arm: Arm, device: str) -> Arm:
    """The arm as a CUDA graph, checked on its first replay; so the others must be ``warmed``."""
    from .cases.arms import change

    name = f"{arm.name}, graph"
    if device != "cuda":
        warmed(arm)
        return Arm(name, arm.run, lambda: change(arm.values, arm.run), arm.tolerance, arm.values)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warmed(arm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm.run()
    return Arm(
        name, graph.replay, lambda: change(arm.values, graph.replay), arm.tolerance, arm.values
    )


@contextmanager
def silent() -> Iterator[None]:
    """Without what C++ writes to stderr: the profiler announces itself at every start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def give_back(device: str) -> None:
    """What nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextmanager
def freed(device: str) -> Iterator[None]:
    """Give back what a case allocated, also after an exception."""
    try:
        yield
    finally:
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()  # compiled functions hold what they closed over
        give_back(device)
