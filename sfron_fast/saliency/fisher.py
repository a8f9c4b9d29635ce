"""Diagonal Fisher information, accumulated in fp32 on the model's own device (docs/equations.md,
equation 2; paper F_diag).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import functional
from ..data.batches import progress_bar
from ..distributed.ranks import Ranks
from ..errors import by_keyword, number, require
from ..models.modes import evaluating, recording
from ..models.names import model_digest
from ..ops import reference
from ..ops.layout import dense, local, ordered, orders_of
from ..ops.lists import zeroed
from ..tasks import Task
from ..tasks.classification import MeanLoss
from ..tasks.task import as_task
from .gradients import Pass, batch_gradients, sample_gradients
from .mask import SaliencyMask

Estimator = Literal["batch", "sample", "batch_equal", "rank"]
LossFn = Callable[[Any, Tensor], Tensor]


class Fisher(dict[str, Tensor]):
    """Parameter name -> fp32 tensor of its shape, with ``metadata`` on how it was made."""

    def __init__(self, values: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
        super().__init__(values)
        self.metadata = metadata or {}


def estimate_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    task: Task | None = None,
    estimator: Estimator = "batch",
    chunk_size: int = 32,
    start: Fisher | None = None,
    progress: bool = False,
    group: Any = None,
) -> Fisher:
    """Diagonal (empirical) Fisher of every trainable parameter over one pass of ``loader``, in eval
    mode.

    Args:
        model: its parameters, buffers and training flags are as before afterwards.
        loader: batches ``(inputs, targets)``, or whatever the task reads; may have a short last
            batch, and empty ones. Inputs are a tensor or a nest of them (dicts, tuples, lists,
            dataclasses). A mapping is unpacked, ``model(**inputs)``: dict or transformers'
            ``BatchEncoding``; all else is one argument. For "sample" every tensor is
            [samples, ...].
        loss_fn: (model output, targets) -> mean loss of the batch []. None = F.cross_entropy, for
            outputs [samples, classes, ...]; it refuses [samples, tokens, classes].
        task: whose mean loss is differentiated instead, for batches of another kind.
        estimator: "sample" = mean of per-sample squared gradients, the definition; "batch" =
            squared batch-mean gradients, each weighted by its true sample count; "batch_equal" =
            the same with every batch counting alike, as the authors' code does (a short last batch
            then weighs too much); "rank" = as "batch", but each rank's part of a batch is squared
            by itself, and the Fishers summed once at the end. A threshold means something else
            under each; the choice is kept in the metadata.
        chunk_size: samples differentiated at a time by "sample"; memory is chunk_size gradients.
        start: an estimate over other samples, of the same weights and by the same estimator, to go
            on from: the result is that of both together, up to rounding. What is kept on the device
            is one fp32 tensor a parameter.
        progress: show a tqdm bar.
        group: process group (``torch.distributed.group.WORLD``) whose ranks share every batch: a
            batch is what all of them draw at the same time, some perhaps less or nothing. The
            gradient of its mean loss is squared after it is reduced, so the result, equal on all
            ranks, does not depend on how many there are. None = this process alone. Models of DDP
            and ``fully_shard`` (not for "sample" and "rank"; values are then DTensors placed as the
            parameters) need it.

    Returns:
        ``Fisher`` with metadata estimator, samples, batches, batch_size (of all ranks together),
        world_size, model (digest) and no_gradient (names of parameters no loss ever reached; a mask
        built from it never selects them).

    Raises:
        ValueError: empty loader, no trainable parameter, unknown estimator, non-finite (found at
            the end of the pass) or non-scalar loss, a label that is no class of the model, a
            ``start`` of something else.
    """
    task = as_task(task, MeanLoss, loss_fn)
    return _estimate(model, loader, "loader", task, estimator, chunk_size, start, progress, group)


@by_keyword
def estimate_mask(
    model: nn.Module,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    loss_fn: LossFn | None = None,
    task: Task | None = None,
    threshold: float = 1.0,
    zero_over_zero: bool = False,
    estimator: Estimator = "batch",
    chunk_size: int = 32,
    progress: bool = False,
    group: Any = None,
) -> SaliencyMask:
    """``SaliencyMask.from_fisher`` of both sets' ``estimate_fisher``.

    Args:
        forget, retain: the loaders of the two sets.

    The other arguments, and the errors, are those of the two functions.
    """
    number("threshold", threshold, 0.0, open_low=True)
    task = as_task(task, MeanLoss, loss_fn)
    rest = (task, estimator, chunk_size, None, progress, group)
    forget_fisher = _estimate(model, forget, "forget", *rest)
    retain_fisher = _estimate(model, retain, "retain", *rest)
    return SaliencyMask.from_fisher(
        forget=forget_fisher,
        retain=retain_fisher,
        threshold=threshold,
        zero_over_zero=zero_over_zero,
    )


def _estimate(
    model: nn.Module,
    loader: Iterable[Any],
    name: str,
    task: Task,
    estimator: Estimator,
    chunk_size: int,
    start: Fisher | None,
    progress: bool,
    group: Any,
) -> Fisher:
    """``estimate_fisher``, with errors about the loader called ``name``."""
    require(
        estimator in get_args(Estimator),
        "estimator",
        "'batch', 'sample', 'batch_equal' or 'rank'",
        repr(estimator),
    )
    good = isinstance(chunk_size, int) and chunk_size > 0
    require(good, "chunk_size", "an integer > 0", repr(chunk_size))
    # who shares the batches, and how gradients of this estimator are reduced
    ranks = Ranks(model, group)
    model = ranks.model
    apart = estimator in ("sample", "rank")  # ranks meet only at the end
    require(
        not (apart and ranks.sharded),
        "estimator",
        "'batch' or 'batch_equal' for a sharded model (FSDP2 reduces "
        "gradients before anybody can square them)",
        repr(estimator),
    )
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    require(bool(params), "model", "at least one parameter that requires grad", "none")
    values = {
        n: zeroed(torch.empty_like(p, dtype=reference.accumulate_dtype(p.dtype)))
        for n, p in params.items()
    }
    # sums of squares in fp32, from zero or from where an earlier estimate stood
    reached: set[str] = set()
    samples = batches = batch_size = 0
    digest = model_digest(model)
    if start is not None:
        samples, batches, batch_size = _go_on(start, values, estimator, digest)
        if apart and ranks.rank > 0:  # the ranks' sums are added up
            torch._foreach_zero_(list(values.values()))
        reached = set(params) - set(start.metadata["no_gradient"])

    # one pass: gradients by batch or by sample, squared as they come
    together = Ranks(model, None) if apart and not ranks.sharded else ranks
    one_pass = Pass(model, task, params, together, chunk_size)
    gradients = sample_gradients if estimator == "sample" else batch_gradients
    with evaluating(model), recording(model):
        prepared = (task.prepare(batch, ranks.device, name) for batch in loader)
        rounds = ranks.rounds((batch, task.samples(batch)) for batch in prepared)
        for batch, counts in progress_bar(rounds, loader, "Fisher", progress):
            count, mine = sum(counts), counts[ranks.rank]
            samples, batches, batch_size = samples + count, batches + 1, max(batch_size, count)
            if apart and not mine:
                continue
            share = 1.0 if apart else mine / count
            weight = float(mine if apart else count)
            if estimator in ("batch_equal", "sample"):
                weight = 1.0
            for grads in gradients(one_pass, batch, share):
                _add_squares(values, grads, weight)
                reached |= grads.keys()
                del grads  # freed before the next backward
    require(
        samples > 0,
        name,
        "at least one sample",
        "an empty loader",
        "check the split and drop_last",
    )
    # the ranks' sums added up, and the mean over samples or batches
    one_pass.check_finite(ranks)
    if apart and group is not None:
        ranks.sum_(values.values())
        found = ranks.any([n in reached for n in params])
        reached = {n for n, there in zip(params, found, strict=True) if there}
    total = batches if estimator == "batch_equal" else samples
    torch._foreach_div_([local(v) for v in values.values()], float(total))
    metadata = {
        "estimator": estimator,
        "samples": samples,
        "batches": batches,
        "batch_size": batch_size,
        "no_gradient": sorted(params.keys() - reached),
        "model": digest,
        "world_size": ranks.size,
    }
    return Fisher(values, metadata)


def _add_squares(values: dict[str, Tensor], grads: dict[str, Tensor], weight: float) -> None:
    """values += weight * grads^2, of the parameters that there is a gradient of."""
    sums = [values[name] for name in grads]
    orders = orders_of(sums)
    functional.fisher_accumulate_(
        ordered(sums, orders), dense(list(grads.values()), orders), weight
    )


def _go_on(
    start: Fisher, values: dict[str, Tensor], estimator: Estimator, digest: str
) -> tuple[int, int, int]:
    """The sums of an earlier estimate into ``values``; its samples, batches, largest batch."""
    theirs = {"estimator": start.metadata.get("estimator"), "model": start.metadata.get("model")}
    ours = {"estimator": estimator, "model": digest}
    require(theirs == ours, "start", f"an estimate with {ours}", theirs)
    require(
        start.keys() == values.keys(),
        "start",
        f"{len(values)} tensors of the model's names",
        len(start),
    )
    total = start.metadata["batches" if estimator == "batch_equal" else "samples"]
    for name, value in values.items():
        value.copy_(start[name]).mul_(total)
    return start.metadata["samples"], start.metadata["batches"], start.metadata["batch_size"]
