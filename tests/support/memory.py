"""How much memory a call takes."""

import gc

from torch.profiler import ProfilerActivity, profile


def peak(call):
    """Bytes that torch's allocator held at most meanwhile, above the least it held before."""
    gc.collect()
    gc.disable()  # what others left and the collector frees meanwhile would be counted too
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            call()
    finally:
        gc.enable()
    held = lowest = highest = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            lowest = min(lowest, held)
            highest = max(highest, held - lowest)
    return highest
