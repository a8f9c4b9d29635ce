"""The denoising loss over the timesteps, by a model as it is: what losses are relative to."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...distributed.ranks import Ranks, shared
from ...errors import by_keyword, integer, require
from ...models.modes import evaluating
from ...tasks import Denoising


class LossProfile(NamedTuple):
    """Mean losses of bins of equally many timesteps."""

    losses: Tensor  # fp32 [bins], on the CPU
    counts: Tensor  # int64 [bins], losses that each is the mean of
    timesteps: int  # T

    def at(self, t: Tensor) -> Tensor:
        """The loss of each timestep's bin, fp32 [samples], where ``t`` (int64 [samples]) lies."""
        return self.losses.to(t.device)[t * len(self.losses) // self.timesteps]


@by_keyword
def loss_profile(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    task: Denoising,
    bins: int = 10,
    draws: int = 8,
    group: Any = None,
) -> LossProfile:
    """The mean loss of ``loader`` in each bin of timesteps, in eval mode, each batch drawn for
    ``draws`` times; no condition is dropped, and the task's draws go on as if nothing had been.

    Args:
        loader: the retain set's batches, before unlearning.
        group: process group whose ranks share every batch; None = all of them for a model of
            DistributedDataParallel or ``fully_shard``, else this process alone.

    Raises:
        ValueError: a setting out of range, a bin without a sample, or with a loss that is not
            positive and finite.
    """
    require(isinstance(task, Denoising), "task", "Denoising", type(task).__name__)
    bins, draws = integer("bins", bins, 1, task.timesteps), integer("draws", draws, 1)
    if group is None and shared(model):
        group = torch.distributed.group.WORLD
    ranks = Ranks(model, group)
    model, device = ranks.model, ranks.device
    total = torch.zeros(bins, dtype=torch.float64, device=device)
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    drawn = (task.prepare(b, device, "retain") for b in loader for _ in range(draws))
    with evaluating(model), torch.no_grad(), task.estimating(ranks.rank, ranks.size):
        for batch, samples in ranks.rounds((b, task.samples(b)) for b in drawn):
            if batch is None:
                continue
            losses = task.checked_losses(model, batch).double()
            if samples[ranks.rank]:
                place = batch["t"] * bins // task.timesteps
                total.index_add_(0, place, losses)
                counts += torch.bincount(place, minlength=bins)
    total, counts = ranks.sum(total), ranks.sum(counts)
    empty = int((counts == 0).sum())
    remedy = "lower bins, or raise draws"
    require(not empty, "loader", f"a sample in each of {bins} bins", f"{empty} empty", remedy)
    losses = (total / counts).float().cpu()
    sound = bool(((losses > 0) & losses.isfinite()).all())
    require(sound, "loader", "losses > 0 and finite", losses.tolist(), "look at the model")
    return LossProfile(losses, counts.cpu(), task.timesteps)
