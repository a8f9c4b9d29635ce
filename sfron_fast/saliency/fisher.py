"""Diagonal Fisher information, accumulated in fp32 on the model's own device (README equation 2,
paper F_diag).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..data.batches import (
    arguments,
    call,
    cross_entropy,
    each_tensor,
    move,
    progress_bar,
    tensors_in,
)
from ..distributed.ranks import Ranks
from ..distributed.shards import local
from ..errors import by_keyword, number, require
from ..models.modes import evaluating, recording
from ..models.names import model_digest
from ..ops import reference
from ..ops.layout import dense, ordered, orders_of
from ..ops.lists import zeroed
from .mask import SaliencyMask

Estimator = Literal["batch", "sample", "batch_equal", "rank"]
LossFn = Callable[[Any, Tensor], Tensor]


class Fisher(dict[str, Tensor]):
    """Parameter name -> fp32 tensor of the parameter's shape, with ``metadata`` on how it was made."""

    def __init__(self, values: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
        super().__init__(values)
        self.metadata = metadata or {}


def estimate_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn = F.cross_entropy,
    *,
    estimator: Estimator = "batch",
    chunk_size: int = 32,
    start: Fisher | None = None,
    progress: bool = False,
    group: Any = None,
) -> Fisher:
    """Diagonal (empirical) Fisher of every trainable parameter over one pass of ``loader``, in eval
    mode.

    Args: model: its parameters, buffers and training flags are as before afterwards. loader:
        batches ``(inputs, targets)``; may have a short last batch, and empty ones. Inputs are a
        tensor or a
            nest of them (dicts, tuples, lists, dataclasses). A mapping is unpacked,
            ``model(**inputs)``: dict or transformers' ``BatchEncoding``; all else is one argument.
            For "sample" every tensor is [samples, ...].
        loss_fn: (model output, targets) -> mean loss of the batch []. The default is for [samples,
            classes, ...]; it refuses [samples, tokens, classes].
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
    Returns: ``Fisher`` with metadata estimator, samples, batches, batch_size (of all ranks
        together), world_size, model (digest) and no_gradient (names of parameters no loss ever
        reached; a mask built from it never selects them).
    Raises: ValueError: empty loader, no trainable parameter, unknown estimator, non-finite (found
        at the end of the pass)
            or non-scalar loss, a label that is no class of the model, a ``start`` of something
            else.
    """
    sums = _sum_squares(model, loader, loss_fn, estimator, chunk_size, progress, group, start)
    _add_squares(sums.values, sums.grads, sums.weight)
    torch._foreach_div_([local(v) for v in sums.values.values()], sums.total)
    return Fisher(sums.values, sums.metadata)


@by_keyword
def estimate_mask(
    model: nn.Module,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    loss_fn: LossFn = F.cross_entropy,
    threshold: float = 1.0,
    zero_over_zero: bool = False,
    estimator: Estimator = "batch",
    chunk_size: int = 32,
    progress: bool = False,
    group: Any = None,
) -> SaliencyMask:
    """``SaliencyMask.from_fisher`` of both sets' ``estimate_fisher``.

    Args: forget, retain: the loaders of the two sets. The other arguments, and the errors, are
        those of the two functions.
    """
    number("threshold", threshold, 0.0, open_low=True)
    settings: dict[str, Any] = {
        "estimator": estimator,
        "chunk_size": chunk_size,
        "progress": progress,
        "group": group,
    }
    forget_fisher = estimate_fisher(model, forget, loss_fn, **settings)
    retain_fisher = estimate_fisher(model, retain, loss_fn, **settings)
    return SaliencyMask.from_fisher(
        forget=forget_fisher,
        retain=retain_fisher,
        threshold=threshold,
        zero_over_zero=zero_over_zero,
    )


class _Sums(NamedTuple):
    """Of a pass over a loader, all but its last gradient: who finishes the Fisher adds it and
    divides by the total.
    """

    values: dict[str, Tensor]
    grads: dict[str, Tensor]  # of the parameters that it reached
    weight: float
    total: float
    metadata: dict[str, Any]


def _sum_squares(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn,
    estimator: Estimator,
    chunk_size: int,
    progress: bool,
    group: Any,
    start: Fisher | None = None,
) -> _Sums:
    require(
        estimator in get_args(Estimator),
        "estimator",
        "'batch', 'sample', 'batch_equal' or 'rank'",
        repr(estimator),
    )
    require(
        isinstance(chunk_size, int) and chunk_size > 0,
        "chunk_size",
        "an integer > 0",
        repr(chunk_size),
    )
    ranks = Ranks(model, group)
    model = ranks.model
    apart = estimator in ("sample", "rank")  # ranks meet only at the end
    together = Ranks(model, None) if apart and not ranks.sharded else ranks
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
    reached: set[str] = set()
    grads: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    weight = 0.0
    samples = batches = batch_size = 0
    digest = model_digest(model)
    if start is not None:
        samples, batches, batch_size = _go_on(start, values, estimator, digest)
        if apart and ranks.rank > 0:  # the ranks' sums are added up
            torch._foreach_zero_(list(values.values()))
        reached = set(params) - set(start.metadata["no_gradient"])
    square = _per_sample if estimator == "sample" else _per_batch
    if loss_fn is F.cross_entropy:
        loss_fn = cross_entropy
    with evaluating(model), recording(model):
        rounds = ranks.rounds(move(batch, ranks.device) for batch in loader)
        for inputs, targets, counts in progress_bar(rounds, loader, "Fisher", progress):
            count, mine = sum(counts), counts[ranks.rank]
            samples, batches, batch_size = samples + count, batches + 1, max(batch_size, count)
            _add_squares(values, grads, weight)
            grads = after = {}  # freed before the next backward
            if apart and not mine:
                continue
            part = _Part(inputs, targets, 1.0 if apart else mine / count)
            equal = estimator == "batch_equal"
            try:
                for after in square(model, params, part, loss_fn, chunk_size, losses, together):
                    _add_squares(values, grads, weight)
                    grads = after
                    weight = (
                        1.0 if equal or estimator == "sample" else float(mine if apart else count)
                    )
                    reached |= grads.keys()
            except (IndexError, RuntimeError) as error:
                if "out of bounds" not in str(error):
                    raise
                raise ValueError(
                    "loader: expected labels that are classes of the model, found one that is none"
                    f" ({error}); give the model one output per class"
                ) from error
    require(
        samples > 0,
        "loader",
        "at least one sample",
        "an empty loader",
        "check the split and drop_last",
    )
    _check_finite(losses, ranks)
    if apart and group is not None:
        _add_squares(values, grads, weight)
        ranks.sum_(values.values())
        grads = {}
        reached = {
            n
            for n, found in zip(params, ranks.any([n in reached for n in params]), strict=True)
            if found
        }
    total = batches if estimator == "batch_equal" else samples
    return _Sums(
        values,
        grads,
        weight,
        float(total),
        {
            "estimator": estimator,
            "samples": samples,
            "batches": batches,
            "batch_size": batch_size,
            "no_gradient": sorted(params.keys() - reached),
            "model": digest,
            "world_size": ranks.size,
        },
    )


def _add_squares(values: dict[str, Tensor], grads: dict[str, Tensor], weight: float) -> None:
    """values += weight * grads^2, of the parameters that there is a gradient of."""
    sums = [values[name] for name in grads]
    orders = orders_of(sums)
    functional.fisher_accumulate_(
        ordered(sums, orders), dense(list(grads.values()), orders), weight
    )


class _Part(NamedTuple):
    """What this rank has of a batch."""

    inputs: Any
    targets: Tensor | None  # None: nothing
    share: float  # of the batch's samples


def _mean_loss(model: nn.Module, inputs: Any, targets: Tensor, loss_fn: LossFn) -> Tensor:
    loss = loss_fn(call(model, inputs), targets)
    require(
        loss.dim() == 0,
        "loss_fn",
        "a scalar mean loss",
        f"shape {tuple(loss.shape)}",
        "use reduction='mean'",
    )
    require(
        loss.requires_grad, "loss_fn", "a loss that depends on a trainable parameter", "a constant"
    )
    return loss


def _check_finite(losses: list[Tensor], ranks: Ranks) -> None:
    """Once for all: to read one waits for the device.

    Raises on every rank, so that none waits for another.
    """
    mine = bool(losses) and not bool(torch.isfinite(torch.cat(losses)).all())
    others = ranks.any([mine]) == [True] and not mine
    require(
        not others,
        "loss_fn",
        "a finite loss",
        "another on another rank",
        "check the data and the model",
    )
    if mine:
        bad = next(i for i, loss in enumerate(losses) if not bool(torch.isfinite(loss).all()))
        require(
            False,
            "loss_fn",
            "a finite loss",
            f"{losses[bad].tolist()} in draw {bad}",
            "check the data and the model",
        )


def _go_on(
    start: Fisher, values: dict[str, Tensor], estimator: Estimator, digest: str
) -> tuple[int, int, int]:
    """Put the sums of an earlier estimate into ``values``; its samples, batches and largest batch."""
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


def _per_batch(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    part: _Part,
    loss_fn: LossFn,
    chunk_size: int,
    losses: list[Tensor],
    ranks: Ranks,
) -> Iterator[dict[str, Tensor]]:
    """The gradient of the batch's mean loss; for "rank" of this rank's part."""
    loss = None
    if part.targets is not None:
        loss = _mean_loss(model, part.inputs, part.targets, loss_fn)
        losses.append(loss.detach().reshape(1))
    yield ranks.gradients(loss, part.share, params)


def _per_sample(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    part: _Part,
    loss_fn: LossFn,
    chunk_size: int,
    losses: list[Tensor],
    ranks: Ranks,
) -> Iterator[dict[str, Tensor]]:
    """Every sample's own gradient, differentiated a chunk at a time."""
    inputs, targets = part.inputs, part.targets
    assert targets is not None
    samples = tensors_in(inputs)
    each = all(isinstance(t, Tensor) and t.shape[:1] == targets.shape[:1] for t in samples)
    require(
        each,
        "estimator",
        "'batch' or 'batch_equal' where inputs are not tensors [samples, ...]",
        "'sample'",
    )
    reached = _reached(model, params, each_tensor(inputs, lambda t: t[:1]), targets[:1], loss_fn)
    plain, prefix = (model.module, "module.") if isinstance(model, nn.DataParallel) else (model, "")
    weights = {n: p.detach() for n, p in params.items() if n in reached}
    rest = {
        **dict(model.named_buffers()),
        **{n: p.detach() for n, p in model.named_parameters() if n not in weights},
    }

    def sample_loss(weights: dict[str, Tensor], x: list[Tensor], y: Tensor) -> Tensor:
        one = iter(x)
        positional, named = arguments(each_tensor(inputs, lambda _: next(one).unsqueeze(0)))
        values = {n.removeprefix(prefix): t for n, t in {**rest, **weights}.items()}
        return loss_fn(torch.func.functional_call(plain, values, positional, named), y.unsqueeze(0))

    grad = torch.func.vmap(torch.func.grad_and_value(sample_loss), in_dims=(None, 0, 0))
    for start in range(0, len(targets), chunk_size):
        stop = start + chunk_size
        try:
            chunk, found = grad(weights, [t[start:stop] for t in samples], targets[start:stop])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "estimator: expected a model that torch.func.vmap can run over samples, found one"
                f" that it cannot ({error}); use 'batch' or batches of one sample"
            ) from error
        losses.append(found.detach().reshape(-1))
        for i in range(len(next(iter(chunk.values())))):
            yield {n: g[i] for n, g in chunk.items()}


def _reached(
    model: nn.Module, params: dict[str, nn.Parameter], inputs: Any, targets: Tensor, loss_fn: LossFn
) -> set[str]:
    """Names of the parameters the loss depends on; torch.func gives zeros for the others, which say
    less.
    """
    loss = _mean_loss(model, inputs, targets, loss_fn)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n for n, g in zip(params, grads, strict=True) if g is not None}
