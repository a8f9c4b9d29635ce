"""A look at a model's first batch: which parameters are used by known functions alone, how their
rows are laid out, and whether samples are treated apart.

Of two samples first one has a loss here, then the other. Where the gradient of rows that should be
the other's is not zero, the rows are laid out otherwise, or samples are mixed.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.batches import each_tensor
from ...errors import require
from ...tasks import Task
from .layouts import FIRST, INNER, SECOND, SPREAD, cutter
from .taps import Taps, backward
from .uses import Use

_LOWEST = 1e-3  # relative change of a loss, by what is beside it, that rounding does not explain
_HALF = 0.1  # the same for bf16 and fp16


@dataclass
class Found:
    """What the look has found."""

    layouts: dict[str, str] = field(default_factory=dict)  # of what known functions use
    left: dict[str, str] = field(default_factory=dict)  # name -> the function that is not known
    mixing: list[str] = field(default_factory=list)  # what mixes samples
    rows: dict[str, set[int]] = field(default_factory=dict)  # of each sample, in calls of the name
    losses: Tensor = field(default_factory=lambda: torch.empty(0))  # of the two samples [2]
    rounding: float = 0.0

    def named(self, most: int) -> str:
        """Some of what is left, with its functions."""
        return ", ".join(f"{name} ({why})" for name, why in list(self.left.items())[:most])


class _Look:
    """The sink of the look."""

    def __init__(self, layouts: dict[str, str]) -> None:
        self.layouts = layouts
        self.other = 1  # the sample without a loss
        self.uses: dict[str, list[Use]] = defaultdict(list)
        self.rows: dict[str, set[int]] = defaultdict(set)
        self.features: dict[str, set[torch.Size]] = defaultdict(set)  # of the inputs of products
        self.unknown: dict[str, str] = {}
        self.failed: set[str] = set()
        self.mixing: list[str] = []
        self.losses = torch.empty(0)
        self.rounding = _LOWEST

    def call(self, name: str, use: Use, samples: int) -> None:
        self.uses[name].append(use)

    def left(self, name: str, function: Any) -> None:
        if name in self.layouts:
            self.unknown.setdefault(name, getattr(function, "__name__", str(function)))
        if function is F.batch_norm:
            self.mixing.append(f"statistics of the batch in {name}")

    def take(
        self, name: str, use: Use, delta: Tensor, saved: tuple[Tensor, ...], samples: int
    ) -> None:
        cut = cutter(self.layouts[name], samples)
        if delta.element_size() < 4:
            self.rounding = _HALF
        try:
            by_sample = cut(delta)
            made = use.read(delta, saved, cut)
        except ValueError:  # no whole number of rows
            self.failed.add(name)
            return
        self.rows[name].add(by_sample.shape[1])
        if use.kind == "product" and not use.tiled:
            self.features[name].add(made[1].shape[1 - use.parameter.dim() :])
        if bool(by_sample[self.other].nan_to_num(0.0).any()):
            self.failed.add(name)


def look(
    taps: Taps,
    model: nn.Module,
    task: Task,
    batch: Any,
    names: list[str],
    anywhere: Callable[[list[bool]], list[bool]],
) -> Found:
    """The first batch's first and last sample, run once or a few times. ``anywhere``: which flags
    are set on any rank, where ranks have to run the model together.
    """
    # one sample alone does not tell its rows from another's
    pair = each_tensor(batch, lambda t: t[[0, -1]])
    found = Found(dict.fromkeys(names, FIRST))
    while True:
        sink = _run(taps, model, task, pair, found)
        found.mixing += [m for m in sink.mixing if m not in found.mixing]
        flags = anywhere([name in sink.failed or name in sink.unknown for name in names])
        bad = [n for n, flag in zip(names, flags, strict=True) if flag and n in found.layouts]
        if not bad:
            # what was not called here has shown nothing
            called = anywhere([n in sink.uses for n in names])
            found.layouts = {
                n: found.layouts[n]
                for n, seen in zip(names, called, strict=True)
                if seen and n in found.layouts
            }
            break
        for name in bad:
            after = _next(found.layouts[name], sink.uses[name], name in sink.unknown)
            if after is None:
                del found.layouts[name]
                found.left[name] = sink.unknown.get(name, "rows that are not one sample's")
            else:
                found.layouts[name] = after
    found.rows, found.losses, found.rounding = sink.rows, sink.losses, sink.rounding
    if anywhere([bool(found.mixing)]) == [False]:
        first = each_tensor(batch, lambda t: t[:1])
        try:  # with gradients, which a model may need in its forward pass
            alone = task.checked(task.losses(model, first), first)
            found.mixing += moved(found, alone.detach())
        except ValueError as error:  # BatchNorm without running statistics
            found.mixing.append(f"a model that one sample is not enough for ({error})")
    return found


def moved(found: Found, losses: Tensor) -> list[str]:
    """What mixes samples, if a sample's loss is not that of the look, with others beside it: of
    the first sample alone, or of the whole batch that the look was at.
    """
    pair, here = found.losses[: len(losses)], losses[[0, -1][: len(losses)]]
    differs = bool(((pair - here).abs() > found.rounding * (1.0 + pair.abs())).any())
    return ["a loss that depends on the samples beside a sample"] if differs else []


def _next(layout: str, uses: list[Use], unknown: bool) -> str | None:
    """The next layout to try."""
    if unknown or layout == INNER or not uses:
        return None
    ids = [u.saved[0] for u in uses if u.kind == "rows"]
    shared = bool(ids) and len(ids) == len(uses) and all(_may_be_shared(i) for i in ids)
    if layout == SECOND:
        return INNER
    return SPREAD if layout == FIRST and shared else SECOND


def _may_be_shared(ids: Tensor) -> bool:
    """Positions [n] or [1, n]."""
    return ids.dim() == 1 or (ids.dim() == 2 and len(ids) == 1)


def _in_two_ways(uses: list[Use]) -> bool:
    """Whether the parts of one parameter cannot be added up before they are squared."""
    kinds = [use.kind for use in uses]
    tiles = any(use.tiled for use in uses) and kinds.count("product") > 1
    return tiles or ("vector" in kinds and len(set(kinds)) > 1)


def _same(model: nn.Module, task: Task, pair: Any, losses: Tensor, rounding: float) -> bool:
    plain = task.losses(model, pair).detach()
    return torch.allclose(losses, plain, rounding, rounding, equal_nan=True)


def _run(taps: Taps, model: nn.Module, task: Task, pair: Any, found: Found) -> _Look:
    sink = _Look(found.layouts)
    spread = {n for n, layout in found.layouts.items() if layout == SPREAD}
    try:
        with taps.telling(sink, 2):
            losses = task.checked(task.losses(model, pair), pair)
            for mine in (0, 1) if losses.requires_grad else ():
                sink.other = 1 - mine
                backward(losses[mine], again=mine == 0)
        sink.losses = losses.detach()
        if spread and not _same(model, task, pair, sink.losses, sink.rounding):
            sink.failed |= spread
    except RuntimeError:
        if not spread:
            raise
        sink.failed |= spread  # a copy for each sample is not what the model can go on with
    for name, uses in sink.uses.items():
        if _in_two_ways(uses) or len(sink.features[name]) > 1:  # groups of a convolution
            sink.unknown.setdefault(name, "uses that do not add up")
    return sink


def check_apart(found: Found) -> None:
    """Raise ValueError where samples are mixed."""
    require(
        not found.mixing,
        "estimator",
        "'batch', or a model that treats the samples of a batch apart",
        f"'sample' and {', '.join(found.mixing[:3])}",
        "put BatchNorm to eval() with running statistics of its own",
    )
