"""One pass of the Fisher of samples: known functions at the price of a batch, the rest sample by
sample.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batches import check_loader
from ...errors import require, warn
from ...ops.dtypes import accumulate_dtype
from ...ops.lists import zeroed
from ...tasks import Task
from ...tasks.task import check_depends
from ..gradients import Pass, SquareSums, by_sample, check_by_sample, sample_gradients
from .separable import Found, check_apart, look, moved
from .squares import SampleSquares
from .taps import Taps, backward


class SamplePass:
    """Adds each sample's squared gradient to ``values``, batch by batch."""

    def __init__(self, one: Pass, values: dict[str, Tensor]) -> None:
        self.one, self.values = one, values
        self.model = _eager(one.model)
        self.taps = Taps(one.model, one.params)
        self.found: Found | None = None
        self.started = False
        self.squares: Any = None
        self.reached: set[str] = set()

    def look(self, batch: Any) -> Found:
        """What the model does with its parameters, found at the first batch."""
        if self.found is None:
            ranks, one = self.one.ranks, self.one
            anywhere = ranks.any if ranks.sharded else list
            try:
                self.found = look(
                    self.taps, self.model, one.task, batch, list(one.params), anywhere
                )
            except (IndexError, RuntimeError):
                one.task.check(one.model, batch)  # a label that is no class, where it is that
                raise
            self.squares = SampleSquares(self.values, self.found.layouts, self.found.left)
        return self.found

    def why_not(self, batch: Any) -> str:
        """Why this model's samples cannot all be told apart here; "" if they can."""
        if not by_sample(self.one.task, batch):
            return "inputs are not tensors [samples, ...]"
        found = self.look(batch)
        return ", ".join(found.mixing[:3]) or found.named(3)

    def start(self, batch: Any) -> None:
        """Before the first batch is added.

        Raises:
            ValueError: samples are mixed; a sharded model with a function that is not known.
        """
        check_by_sample(self.one.task, batch)
        found = self.look(batch)
        check_apart(found)
        if not found.left:
            return
        named = found.named(5)
        require(
            not self.one.ranks.sharded,
            "estimator",
            "'batch', for a sharded model with functions that are not known",
            f"'sample' and {named}",
        )
        warn(
            f"{len(found.left)} of {len(self.values)} parameters go through torch.func.vmap, which"
            f" takes longer and the memory of their gradients chunk_size times: {named}"
        )

    def add(self, batch: Any, weight: float = 1.0, counted: bool = True) -> None:
        """values += weight * squared gradients of the batch's samples; of a rank that only runs
        along (``counted`` False) nothing.
        """
        first = not self.started
        if first:
            self.start(batch)
            self.started = True
        assert self.found is not None
        task, samples = self.one.task, self.one.task.samples(batch)
        self.squares.weight, self.squares.counted = weight, counted
        self.squares.rows = self.found.rows if first else None
        try:
            with self.taps.telling(self.squares, samples):
                losses = task.checked(task.losses(self.model, batch), batch)
                if first:
                    self._compare(losses.detach())
                if not self.found.left:
                    check_depends(losses, task)
                if losses.requires_grad:
                    backward(losses.sum())
            self.squares.finish(samples)
        except (IndexError, RuntimeError):
            task.check(self.one.model, batch)
            raise
        self.one.losses.append(losses.detach())
        if self.found.left and counted:
            self._alone(batch, weight)
        self.reached |= self.squares.reached

    def _compare(self, losses: Tensor) -> None:
        """With the look's, whose two samples had no others beside them.

        Raises:
            ValueError: samples are mixed after all; on every rank of a sharded model.
        """
        assert self.found is not None
        mixing = moved(self.found, losses)
        if self.one.ranks.any([bool(mixing)]) == [True]:
            self.found.mixing += mixing or ["the same on another rank"]
        check_apart(self.found)

    def _alone(self, batch: Any, weight: float) -> None:
        one = self.one
        left = {n: p for n, p in one.params.items() if n in self.found.left}  # type: ignore[union-attr]
        rest = Pass(one.model, one.task, left, one.ranks, one.chunk_size)
        sums = SquareSums({n: self.values[n] for n in left})
        for grads in sample_gradients(rest, batch):
            sums.add([grads.get(n) for n in left], weight)
            self.reached |= grads.keys()


def _eager(model: nn.Module) -> nn.Module:
    """The model itself within torch.compile and DataParallel."""
    bare = getattr(model, "_orig_mod", model)
    return bare.module if isinstance(bare, nn.DataParallel) else bare


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a Fisher is of.

    Raises:
        ValueError: there is none, or a complex one.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    require(bool(params), "model", "at least one parameter that requires grad", "none")
    for name, p in params.items():
        real = p.is_floating_point()
        require(real, "model", "trainable parameters that are real", f"{p.dtype} in {name!r}")
    return params


def sums_like(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """fp32 (fp64) zeros of each parameter's shape and layout."""
    return {
        n: zeroed(torch.empty_like(p, dtype=accumulate_dtype(p.dtype), requires_grad=False))
        for n, p in params.items()
    }


def drawn(
    task: Task, loader: Iterable[Any], draws: int, device: torch.device, name: str
) -> Iterator[tuple[Any, int]]:
    """Each batch of the loader called ``name``, prepared ``draws`` times, and its samples."""
    check_loader(loader, name)
    for batch in loader:
        for _ in range(draws):
            prepared = task.prepare(batch, device, name)
            yield prepared, task.samples(prepared)
