"""Times arms in turn, a GPU's by its own clock; what disagrees with the first arm is not timed."""

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, cycle
from typing import Any

import torch

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
        """Fill the L2 cache with other lines; by reading, as lines written here would be written out later."""
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
        """(until the call returns, until the device is done): medians, with nothing queued before."""
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
        return sum(not e.name.startswith(("Optimizer.", "ProfilerStep")) for e in mine)  # names of ranges

    def peak_mb(self, run: Callable[[], Any]) -> float:
        """What one call allocates at most, beside what is there already."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            self.wait()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        activities = [torch.profiler.ProfilerActivity.CPU]
        with silent(), torch.profiler.profile(activities=activities, profile_memory=True) as seen:
            run()
        found = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate((e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())), initial=0)) / 2**20


def time_arms(
    case: str, arms: list[Arm], moved: int, clock: Clock, seconds: float, note: Note, least: int = 7, most: int = 100
) -> list[Row]:
    """Drop the arms that fail or disagree with the first that is checked, then time the others in turn."""
    arms = list(_agreeing(arms, note))
    for arm in [*arms, *arms]:
        arm.run()
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    began, order = time.perf_counter(), turns(arms)
    for rounds in range(most if arms else 0):
        if rounds >= least and time.perf_counter() - began > seconds:
            break
        for arm in next(order):
            times[arm.name].append(clock.device_seconds(arm.run))
    rows = []
    for arm in arms:
        row = make_row(case, arm.name, times[arm.name], moved)
        if clock.cuda:
            host, wall = clock.host_seconds(arm.run, 5 if row.p50_ms > 20 else 15)
            row.host_ms, row.wall_ms = host * 1e3, wall * 1e3
        row.peak_mb = clock.peak_mb(arm.run)
        rows.append(row)
        try:
            row.launches = clock.launches(arm.run) if row.host_ms < 50 else -1  # the profiler is slow on long lists
        except Exception as error:
            note(arm.name, f"launches not counted: {first_line(error)}")
    probe = next((row for row in rows if row.arm.startswith("probe")), None)
    for row in rows if probe else []:
        row.of_probe = probe.p50_ms / row.p50_ms
    return rows


def turns(arms: Sequence[Any]) -> Iterator[list[Any]]:
    """Rounds in random order; none begins with what ended the last, which would find its own data in the caches."""
    draw, order = random.Random(0), list(arms)
    while True:
        last = order[-1]
        draw.shuffle(order)
        if order[0] is last:
            order.append(order.pop(0)) if len(order) > 2 else order.reverse()
        yield list(order)


def _agreeing(arms: list[Arm], note: Note) -> Iterator[Arm]:
    wanted, told = None, ""
    for arm in arms:
        if arm.check is not None:
            try:
                found = arm.check()
                error = 0.0 if wanted is None else difference(found, wanted)
            except Exception as failure:
                note(arm.name, f"failed: {first_line(failure)}")
                continue
            if not error <= arm.tolerance:
                note(arm.name, f"differs from {told} by {error:.1e}: not timed")
                continue
            if wanted is None:
                wanted, told = found, arm.name
        yield arm


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def rotating(name: str, step: Callable[[Any], Any], inputs: list[Any], tolerance: float = 1e-3) -> Arm:
    """``step`` on one input after the other, so that small ones are not found in a cache; the first is checked."""
    turn = cycle(inputs)
    return Arm(name, lambda: step(next(turn)), lambda: step(inputs[0]), tolerance)


WARM = 3  # calls before a capture, and before the check of an arm that is compared with a captured one


def warmed(arm: Arm) -> Arm:
    for _ in range(WARM):
        arm.run()
    return arm


def replayed(arm: Arm, device: str) -> Arm:
    """The arm as a replayed CUDA graph; checked on its first replay, so the others must be ``warmed``."""
    from .arms import change

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
    return Arm(name, graph.replay, lambda: change(arm.values, graph.replay), arm.tolerance, arm.values)


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


@contextmanager
def freed(device: str) -> Iterator[None]:
    """Give back what a case allocated, also after an exception."""
    try:
        yield
    finally:
        if dynamo := sys.modules.get("torch._dynamo"):
            dynamo.reset()  # compiled functions hold what they closed over
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
