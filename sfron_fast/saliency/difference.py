"""A mask from one tensor a parameter: F_forget - threshold * F_retain, instead of two Fishers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..data.batches import progress_bar
from ..distributed.ranks import Ranks
from ..errors import require
from ..models.modes import evaluating, recording
from ..models.names import model_digest
from ..ops import reference
from ..ops.layout import local
from ..tasks import Task
from .gradients import Pass
from .mask import SaliencyMask
from .samples.one_pass import SamplePass, drawn, sums_like, trainable
from .selection import versions
from .shards import whole_bits


def difference_mask(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    task: Task,
    threshold: float,
    zero_over_zero: bool,
    draws: int,
    progress: bool | None,
    group: Any,
) -> SaliencyMask:
    """``estimate_mask(..., low_memory=True)``: bits where the difference is >= (threshold - 1)
    1e-15, as in ``SaliencyMask.from_fisher``, which refuses what is not finite too.
    """
    ranks = Ranks(model, group)
    model = ranks.model
    params = trainable(model)
    digest = model_digest(model)
    values = sums_like(params)
    alone = ranks if ranks.sharded else Ranks(model, None)
    sides = {"forget": forget, "retain": retain}
    counts = {name: _count(task, loader, name, ranks) for name, loader in sides.items()}
    weights = {"forget": 1.0, "retain": -threshold}
    reached: set[str] = set()
    made: dict[str, Any] = {}
    for name, loader in sides.items():
        one = Pass(model, task, params, alone, 1)
        squares = SamplePass(one, values)
        weight = weights[name] / (counts[name] * draws)
        sharing = task.estimating(ranks.rank, ranks.size)
        with evaluating(model), recording(model), sharing:
            rounds = ranks.rounds(drawn(task, loader, draws, ranks.device, name))
            seen = 0
            for batch, found in progress_bar(rounds, loader, "Fisher", progress):
                seen += sum(found)
                mine = found[ranks.rank]
                if mine or ranks.sharded:
                    _check_known(squares, batch)
                    squares.add(batch, weight, mine > 0)
        same = seen == counts[name] * draws
        remedy = "let it give the same samples each time"
        require(same, name, f"{counts[name]} samples in every pass", seen // draws, remedy)
        one.check_finite(ranks, name)
        flags = ranks.any([n in squares.reached for n in params])
        here = {n for n, there in zip(params, flags, strict=True) if there}
        reached |= here
        made[name] = {
            "estimator": "sample",
            "samples": counts[name],
            "no_gradient": sorted(params.keys() - here),
            "model": digest,
            "world_size": ranks.size,
        }
        if draws > 1:
            made[name]["draws"] = draws
    if not ranks.sharded:
        ranks.sum_(values.values())

    low = (threshold - 1.0) * reference.FISHER_EPS
    bits = {}
    for name, value in values.items():
        difference = local(value)
        sound = ranks.any([not bool(torch.isfinite(difference).all())]) == [False]
        remedy = "check the loss and the data"
        require(sound, f"the difference at {name!r}", "finite values", "others", remedy)
        chosen = difference >= low
        if not zero_over_zero:
            chosen &= difference != 0
        if name not in reached:
            chosen.zero_()
        bits[name] = whole_bits(reference.pack_bits(chosen), value)
    settings = {"threshold": threshold, "zero_over_zero": bool(zero_over_zero), "low_memory": True}
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    return SaliencyMask(bits, shapes, {**settings, **made, "versions": versions()})


def _count(task: Task, loader: Iterable[Any], name: str, ranks: Ranks) -> int:
    """The samples of all ranks, before the first of them is weighted."""
    twice = iter(loader) is not loader
    require(twice, name, "a loader that can be passed twice, with low_memory", "an iterator")
    mine = torch.tensor([sum(task.samples(batch) for batch in loader)], device=ranks.device)
    ranks.sum_([mine])
    count = int(mine)
    require(count > 0, name, "at least one sample", "an empty loader", "check the split")
    return count


def _check_known(squares: SamplePass, batch: Any) -> None:
    if squares.started:
        return
    why = squares.why_not(batch)
    require(not why, "low_memory", "False, for this model", f"True: {why}")
