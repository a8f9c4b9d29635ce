"""Diagonal Fisher information, accumulated in fp32 on the model's own device (docs/equations.md,
equation 2; paper F_diag).
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..data.batches import progress_bar
from ..distributed.ranks import Ranks
from ..errors import by_keyword, number, require, warn
from ..models.modes import evaluating, recording
from ..models.names import model_digest
from ..ops.layout import local
from ..tasks import Task
from ..tasks.classification import MeanLoss
from ..tasks.task import as_task
from .diagonal import Fisher
from .difference import difference_mask
from .gradients import Pass, SquareSums, batch_gradients
from .mask import SaliencyMask
from .samples.one_pass import SamplePass, drawn, sums_like, trainable

Estimator = Literal["batch", "sample", "batch_equal", "rank"]
LossFn = Callable[[Any, Tensor], Tensor]


def estimate_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    task: Task | None = None,
    estimator: Estimator | None = None,
    chunk_size: int = 32,
    draws: int = 1,
    start: Fisher | None = None,
    progress: bool | None = None,
    group: Any = None,
) -> Fisher:
    """Diagonal (empirical) Fisher of every trainable parameter over one pass of ``loader``, in eval
    mode.

    "sample" is within a factor of two of "batch": from what linear layers, convolutions,
    embeddings, norms and parameters added or multiplied get, and the gradient of what they give,
    each sample's own gradient is squared without being kept (docs/equations.md, 2). It asks that
    samples are treated apart, which a look at the first batch finds out.

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
            under each; the choice is kept in the metadata. None = "sample" where every parameter is
            used by functions that are known (below), else "batch", with a warning that says why.
        chunk_size: samples differentiated at a time by torch.func.vmap, of parameters used by
            functions that are not known; memory is chunk_size times their gradients.
        draws: how often "sample" prepares each batch, where a task draws at random (a time step,
            noise): every draw is squared, and the mean taken over all.
        start: an estimate over other samples, of the same weights and by the same estimator, to go
            on from: the result is that of both together, up to rounding. What is kept on the device
            is one fp32 tensor a parameter.
        progress: show a tqdm bar; None = where stderr is a terminal.
        group: process group (``torch.distributed.group.WORLD``) whose ranks share every batch: a
            batch is what all of them draw at the same time, some perhaps less or nothing. The
            gradient of its mean loss is squared after it is reduced, those of samples before, so
            the result, equal on all ranks, does not depend on how many there are. None = this
            process alone. Models of DDP and ``fully_shard`` (not for "rank"; values are then
            DTensors placed as the parameters) need it.

    Returns:
        ``Fisher`` with metadata estimator, samples, batches, batch_size (of all ranks together),
        world_size, model (digest) and no_gradient (names of parameters no loss ever reached; a mask
        built from it never selects them).

    Raises:
        ValueError: empty loader, no trainable parameter or a complex one, unknown estimator,
            non-finite (found at the end of the pass) or non-scalar loss, a label that is no class
            of the model, a ``start`` of something else; with "sample" a model that mixes samples.
        RuntimeError: "sample", and torch.func.vmap cannot run what it has to.
    """
    task = as_task(task, MeanLoss, loss_fn)
    rest = (estimator, chunk_size, draws, start, progress, group)
    return _estimate(model, loader, "loader", task, *rest)


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
    estimator: Estimator | None = None,
    chunk_size: int = 32,
    draws: int = 1,
    low_memory: bool = False,
    progress: bool | None = None,
    group: Any = None,
) -> SaliencyMask:
    """``SaliencyMask.from_fisher`` of both sets' ``estimate_fisher``.

    Args:
        forget, retain: the loaders of the two sets.
        low_memory: one fp32 tensor a parameter, F_forget - threshold * F_retain, where two Fishers
            and a gradient are three. Only by samples and known functions; both loaders are counted
            first, so they must be there twice. The mask is that of two Fishers but where the two
            sides differ by less than the rounding of either, samples * 2^-23 of it at most; and
            "0 / 0" is wherever the difference is exactly 0.

    The other arguments, and the errors, are those of the two functions.
    """
    threshold = number("threshold", threshold, 0.0, open_low=True)
    task = as_task(task, MeanLoss, loss_fn)
    if low_memory:
        _check_counts(chunk_size, draws)
        whole = estimator in (None, "sample")
        require(whole, "estimator", "'sample', with low_memory", repr(estimator))
        return difference_mask(
            model, forget, retain, task, threshold, zero_over_zero, draws, progress, group
        )
    rest = (chunk_size, draws, None, progress, group)
    forget_fisher = _estimate(model, forget, "forget", task, estimator, *rest)
    made_by = forget_fisher.metadata["estimator"]
    retain_fisher = _estimate(model, retain, "retain", task, made_by, *rest)
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
    estimator: Estimator | None,
    chunk_size: int,
    draws: int,
    start: Fisher | None,
    progress: bool | None,
    group: Any,
) -> Fisher:
    """``estimate_fisher``, with errors about the loader called ``name``."""
    known = estimator is None or estimator in get_args(Estimator)
    expected = "'sample', 'batch', 'batch_equal' or 'rank'"
    require(known, "estimator", expected, repr(estimator))
    _check_counts(chunk_size, draws)
    ranks = Ranks(model, group)
    model, progress = ranks.model, progress if progress or ranks.rank == 0 else False
    require(
        not (estimator == "rank" and ranks.sharded),
        "estimator",
        "'sample', 'batch' or 'batch_equal' for a sharded model (FSDP2 reduces gradients before"
        " anybody can square them)",
        repr(estimator),
    )
    params = trainable(model)
    values = sums_like(params)
    digest = model_digest(model)
    alone = ranks if ranks.sharded else Ranks(model, None)
    squares = SamplePass(Pass(model, task, params, alone, chunk_size), values)
    sharing = task.estimating(ranks.rank, ranks.size)
    with evaluating(model), recording(model), sharing:
        rounds = ranks.rounds(drawn(task, loader, draws, ranks.device, name))
        first = next(rounds, None)
        remedy = "check the split and drop_last"
        require(first is not None, name, "at least one sample", "an empty loader", remedy)
        assert first is not None
        if estimator is None:
            estimator = _choose(squares, first, ranks)
        once = draws == 1 or estimator == "sample"
        require(once, "draws", f"1, with estimator {estimator!r}", draws, "use 'sample'")
        apart = estimator in ("sample", "rank") and not ranks.sharded  # ranks meet at the end
        one_pass = squares.one
        if estimator != "sample" and not apart:
            one_pass = Pass(model, task, params, ranks, chunk_size)

        # sums of squares in fp32, from zero or from where an earlier estimate stood
        reached: set[str] = set()
        samples = batches = batch_size = 0
        if start is not None:
            samples, batches, batch_size = _go_on(start, values, estimator, digest, draws)
            if apart and ranks.rank > 0:  # the ranks' sums are added up
                torch._foreach_zero_(list(values.values()))
            reached = set(params) - set(start.metadata["no_gradient"])

        # one pass: gradients by batch or by sample, squared as they come
        sums = SquareSums(values)
        for batch, counts in progress_bar(chain([first], rounds), loader, "Fisher", progress):
            count, mine = sum(counts), counts[ranks.rank]
            samples, batches, batch_size = samples + count, batches + 1, max(batch_size, count)
            if apart and not mine:
                continue
            if estimator == "sample":
                squares.add(batch, counted=mine > 0)
                continue
            weight = float(mine if apart else count)
            if estimator == "batch_equal":
                weight = 1.0
            grads = batch_gradients(one_pass, batch, 1.0 if apart else mine / count)
            sums.add(grads, weight)
            reached |= {n for n, g in zip(params, grads, strict=True) if g is not None}
            del grads  # freed before the next backward
    reached |= squares.reached

    # the ranks' sums added up, and the mean over samples or batches
    one_pass.check_finite(ranks, name)
    if apart and group is not None:
        ranks.sum_(values.values())
    if group is not None and estimator in ("sample", "rank"):
        found = ranks.any([n in reached for n in params])
        reached = {n for n, there in zip(params, found, strict=True) if there}
    total = batches if estimator == "batch_equal" else samples
    torch._foreach_div_([local(v) for v in values.values()], float(total))
    metadata = {
        "estimator": estimator,
        "samples": samples // draws,
        "batches": batches // draws,
        "batch_size": batch_size,
        "no_gradient": sorted(params.keys() - reached),
        "model": digest,
        "world_size": ranks.size,
    }
    if draws > 1:
        metadata["draws"] = draws
    return Fisher(values, metadata)


def _check_counts(chunk_size: int, draws: int) -> None:
    for argument, count in (("chunk_size", chunk_size), ("draws", draws)):
        good = isinstance(count, int) and count > 0
        require(good, argument, "an integer > 0", repr(count))


def _choose(squares: SamplePass, first: tuple[Any, list[int]], ranks: Ranks) -> Estimator:
    """ "sample", if the first batch shows known functions alone; on no rank anything else."""
    batch, counts = first
    why = ""
    if counts[ranks.rank] or ranks.sharded:
        why = squares.why_not(batch)
    if ranks.any([bool(why)]) == [False]:
        return "sample"
    warn(
        f"estimator 'batch' is used, not 'sample': {why or 'another rank says so'}. It squares"
        " batch means, so a mask depends on how the sets were cut into batches; say"
        " estimator='batch' to have it so, or estimator='sample' where torch.func.vmap can run the"
        " model"
    )
    return "batch"


def _go_on(
    start: Fisher, values: dict[str, Tensor], estimator: Estimator, digest: str, draws: int
) -> tuple[int, int, int]:
    """The sums of an earlier estimate into ``values``; its samples, batches, largest batch, as
    often as they were drawn.
    """
    made = start.metadata
    theirs = {k: made.get(k) for k in ("estimator", "model")} | {"draws": made.get("draws", 1)}
    ours = {"estimator": estimator, "model": digest, "draws": draws}
    require(theirs == ours, "start", f"an estimate with {ours}", theirs)
    require(
        start.keys() == values.keys(),
        "start",
        f"{len(values)} tensors of the model's names",
        len(start),
    )
    total = made["batches" if estimator == "batch_equal" else "samples"] * draws
    for name, value in values.items():
        value.copy_(start[name]).mul_(total)
    return made["samples"] * draws, made["batches"] * draws, made["batch_size"]
