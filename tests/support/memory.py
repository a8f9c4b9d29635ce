"""How much memory a call takes."""

import gc

from torch.profiler import ProfilerActivity, profile


def peak(call):
    """Bytes that torch's allocator held at most meanwhile, above the least it held before."""
    held = lowest = highest = 0
    for size in _allocations(call):
        held += size
        lowest = min(lowest, held)
        highest = max(highest, held - lowest)
    return highest


def largest(call):
    """Bytes of the largest single allocation meanwhile."""
    return max(_allocations(call))


def _allocations(call):
    """Bytes allocated, and freed (negative), in order."""
    gc.collect()
    gc.disable()  # what others left and the collector frees meanwhile would be counted too
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            call()
    finally:
        gc.enable()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return [event.nbytes() for event in events if event.name() == "[memory]"]
