"""What a step holds in memory, by torch's profiler, on a wider model that has learnt nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import sfron_fast as sf
from sfron_fast import methods
from sfron_fast.models.linear import matrix

from ..facts import Loader, make_model, people, together

DEPTH, WIDTH, INNER, SEQUENCES = 4, 512, 1280, 8


def allocations(call: Callable[[], Any]) -> dict[str, int]:
    """Bytes: the most that was held at a time beyond what was there, and the largest piece."""
    call()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = highest = largest = 0
    for size in (event.nbytes() for event in events if event.name() == "[memory]"):
        held += size
        highest, largest = max(highest, held), max(largest, size)
    return {"peak": highest, "largest": largest}


def held(layers: str, rank: int, seed: int) -> dict[str, Any]:
    """By R2F's whole step, and by the true gradients of the same layers."""
    model = make_model(seed, DEPTH, WIDTH, INNER)
    facts, task = together(people(seed, SEQUENCES // 2)), sf.Language()
    batch = next(iter(Loader(facts, SEQUENCES, seed)))
    decoder = methods.fit_decoder(model, loader=[batch], layers=layers, rank=rank, task=task)
    weights = [model.get_submodule(name).weight for name in decoder.down]

    def step() -> None:
        methods.r2f(model, forget=[batch], decoder=decoder, norm=1e-3, task=task)

    def true() -> None:
        torch.autograd.grad(task.mean_loss(model, batch), weights)

    sizes = [matrix(model.get_submodule(name)).numel() * 4 for name in decoder.down]
    return {
        "R2F": allocations(step),
        "true gradient": allocations(true),
        "smallest matrix": min(sizes),
        "all matrices": sum(sizes),
    }
