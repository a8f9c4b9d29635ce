"""The gradients that a Fisher squares: of a batch's mean loss, or of every sample's own."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .. import functional
from ..data.batches import each_tensor, tensors_in
from ..distributed.ranks import Ranks
from ..errors import require
from ..ops import native, registry, tables
from ..ops.layout import dense, ordered, orders_of
from ..tasks import Task
from ..tasks.task import check_depends

Gradients = dict[str, Tensor]  # name -> gradient, of the parameters that the loss reaches


class Pass:
    """One pass over a loader: what its gradients are of, and the losses met on the way."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        params: dict[str, nn.Parameter],
        ranks: Ranks,
        chunk_size: int,
    ) -> None:
        self.model, self.task, self.params, self.ranks = model, task, params, ranks
        self.chunk_size = chunk_size
        self.losses: list[Tensor] = []

    def mean_loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch [], which a trainable parameter must have a part in."""
        loss = self.task.mean_loss(self.model, batch)
        check_depends(loss, self.task)
        return loss

    def check_finite(self, ranks: Ranks, name: str) -> None:
        """Once for all of the loader called ``name``, as to read a loss waits for the device.

        Raises:
            ValueError: a loss was not finite; on every rank, so that none waits for another.
        """
        met = torch.cat(self.losses) if self.losses else torch.zeros(0)
        bad = met[~met.isfinite()]
        others = ranks.any([len(bad) > 0]) == [True] and not len(bad)
        wanted, remedy = "a finite loss of every sample", "check the data, the loss and the model"
        require(not others, name, wanted, "another on another rank", remedy)
        require(not len(bad), name, wanted, bad[:1].tolist(), remedy)


def batch_gradients(one: Pass, batch: Any, share: float) -> list[Tensor | None]:
    """Each parameter's gradient of the batch's mean loss, None where the loss does not reach it.

    This rank has ``share`` of the samples; ``batch`` is None if it has none.
    """
    loss = None
    if batch is not None:
        loss = one.mean_loss(batch)
        one.losses.append(loss.detach().reshape(1))
    return one.ranks.gradients(loss, share, one.params)


def by_sample(task: Task, batch: Any) -> bool:
    """Whether every tensor of a batch can be cut into its samples."""
    samples = task.samples(batch)
    return all(isinstance(t, Tensor) and t.shape[:1] == (samples,) for t in tensors_in(batch))


def check_by_sample(task: Task, batch: Any) -> None:
    """Raise ValueError for a batch that is not ``by_sample``."""
    expected = "'batch' or 'batch_equal' where inputs are not tensors [samples, ...]"
    require(by_sample(task, batch), "estimator", expected, "'sample'")


def sample_gradients(one: Pass, batch: Any) -> Iterator[Gradients]:
    """Every sample's own gradient, differentiated ``chunk_size`` of them at a time."""
    task, model = one.task, one.model
    count, tensors = task.samples(batch), tensors_in(batch)
    check_by_sample(task, batch)
    reached = _reached(one, each_tensor(batch, lambda t: t[:1]))
    losses_of = _Losses(task, model.module if isinstance(model, nn.DataParallel) else model)
    prefix = "module." if isinstance(model, nn.DataParallel) else ""
    weights = {n: p.detach() for n, p in one.params.items() if n in reached}
    rest = {
        **dict(model.named_buffers()),
        **{n: p.detach() for n, p in model.named_parameters() if n not in weights},
    }

    def sample_loss(weights: Gradients, sample: list[Tensor]) -> Tensor:
        left = iter(sample)
        alone = each_tensor(batch, lambda _: next(left).unsqueeze(0))
        tensors = {**rest, **weights}
        values = {f"model.{n.removeprefix(prefix)}": t for n, t in tensors.items()}
        return torch.func.functional_call(losses_of, values, (alone,)).reshape(())

    gradient = torch.func.vmap(torch.func.grad_and_value(sample_loss), in_dims=(None, 0))
    for first in range(0, count, one.chunk_size):
        chunk = [t[first : first + one.chunk_size] for t in tensors]
        try:
            found, losses = gradient(weights, chunk)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:
            task.check(model, batch)  # a label that is no class, where it is that
            raise RuntimeError(
                "estimator: expected a model that torch.func.vmap can run over samples, found one"
                f" that it cannot ({error}); use 'batch', for batches of one sample the same"
            ) from error
        one.losses.append(losses.detach().reshape(-1))
        for i in range(len(losses)):
            yield {n: g[i] for n, g in found.items()}


class SquareSums:
    """Sums of squared gradients that a run adds to: their half of the op's table is written once.

    Until the run ends nobody else sees the tensors: no graph can have saved them, so autograd is
    not told of each write. A mode or transform (``tables.watched``) lasts from before to after it.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        sums = list(values.values())
        self.orders = orders_of(sums)
        self.sums = ordered(sums, self.orders)  # kept: the table points to their shapes
        # its second half is the gradients', written in every call; in another order they may have
        # to be copied
        self.table = None if self.orders else tables.table_of((self.sums, self.sums))
        if self.table is not None:
            self.rows = self.table[2 : 2 + native.ROW_WORDS * len(sums)]
            self.op = registry.described("fisher_accumulate_").table

    def add(self, grads: list[Tensor | None], weight: float) -> None:
        """values += weight * grads^2; there is a gradient for each, or None."""
        if (
            self.table is not None
            and not is_dynamo_compiling()  # it may trace this though it has not traced the above
            # refuses None too
            and native.describe(self.table, (self.rows, grads)) == native.BY_TABLE
        ):
            self.op(self.table, weight)
            return
        there = [i for i, g in enumerate(grads) if g is not None]
        orders = tuple(self.orders[i] for i in there) if self.orders else ()
        found = dense([g for g in grads if g is not None], orders)
        functional.fisher_accumulate_([self.sums[i] for i in there], found, weight)


class _Losses(nn.Module):
    """A task's losses of a model, as a module: ``torch.func.functional_call`` then puts other
    tensors into the model itself, whatever of it the task calls.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Any) -> Tensor:
        return self.task.losses(self.model, batch)


def _reached(one: Pass, batch: Any) -> set[str]:
    """Names of the parameters the loss depends on; torch.func gives zeros for the others, which say
    less.
    """
    loss = one.mean_loss(batch)
    grads = torch.autograd.grad(loss, list(one.params.values()), allow_unused=True)
    return {n for n, g in zip(one.params, grads, strict=True) if g is not None}
