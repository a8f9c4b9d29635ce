"""Updates that round to nothing: a bf16 weight of 1 moves by 2^-8 or not at all, and unlearning
uses rates of 1e-6.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..ops import reference
from ..ops.layout import local
from ..saliency.shards import local_bits
from .base import SFRonOptimizer

LOW = (torch.bfloat16, torch.float16)
ENOUGH = 0.1  # share of the weights with a gradient


@contextmanager
def rounding_check(optimizer: SFRonOptimizer) -> Iterator[None]:
    """Warn (RuntimeWarning) if the step inside moves fewer than a tenth of the bf16 and fp16
    weights with a gradient; of a sharded model those of this rank.

    For the first steps of a run: it copies those weights and waits for the device. ``unlearn`` does
    it by itself. The arithmetic is fp32 in any case; only the store rounds.
    """
    forgets, skipped = not optimizer.mid_cycle, optimizer.skipped_steps
    low = [
        (g, i, p)
        for g in optimizer.param_groups
        for i, p in enumerate(g["params"])
        if p.dtype in LOW and g["weight_bits"] is None
    ]
    before = [local(p.detach()).clone() for _, _, p in low]
    yield
    if not low or optimizer.skipped_steps != skipped:
        return
    forgets = forgets and optimizer.mid_cycle
    reached = moved = 0
    for (group, i, param), old in zip(low, before, strict=True):
        if param.grad is not None:
            chosen = local(param.grad) != 0
            if forgets and group["masked"] and optimizer.saliency is not None:
                bits = local_bits(optimizer.saliency[group["param_names"][i]], param)
                chosen &= reference.unpack_bits(bits, chosen.shape).to(chosen.device)
            reached += int(chosen.sum())
            moved += int((chosen & (local(param.detach()) != old)).sum())
    if reached and moved < ENOUGH * reached:
        warnings.warn(
            f"updates round to nothing: of {reached} bf16 or fp16 weights with a gradient {moved}"
            f" moved in a {'forget' if forgets else 'retain'} step; make the optimizer"
            " with weight_bits=24, or keep the weights in float32 and use torch.autocast",
            RuntimeWarning,
            stacklevel=3,
        )
