"""What training holds in memory beside weights and activations, measured and not calculated."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile


def _held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages of all gradients and of the optimizer's state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [p.grad for p in parameters if p.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values()
                if isinstance(t, torch.Tensor)]  # fmt: skip
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@contextmanager
def held_by_training() -> Iterator[list[int]]:
    """Bytes of gradients and state after each step of any torch optimizer within."""
    found: list[int] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.append(_held(optimizer))

    handle = register_optimizer_step_post_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that torch's allocator held at most meanwhile, above what it held before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = highest = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest
