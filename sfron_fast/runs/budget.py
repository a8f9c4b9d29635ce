"""Forgetting under a budget: the learning rates follow what the retain loss has risen.

    spent = (retain loss - retain loss before) / (budget * holdout loss before)

The retain loss is that of batches the run does not train on; the holdout loss is its scale, as a
memorised retain set has next to none of its own. Over the first ``RAMP`` of the run the budget is
given out evenly. After each cycle the forget learning rate rises while less is spent than has been
given out, falls when more is, and is shut where the spending, a rise taken to go on for ``AHEAD``
cycles, is ``WIDTH`` above. Where it is shut and the spending does not fall, the retain steps
themselves cost too much, and ``lr`` falls. All of it stays on the device.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks, shared
from ..errors import by_keyword, number, require, warn
from ..models.modes import evaluating
from ..tasks import Classification, Task
from ..tasks.task import as_task

BUDGET = 0.05  # where nobody says
GAIN = 4.0  # nats that the learning rate rises over a run with nothing spent
FALL = 3.0  # how many times faster it may fall
RAMP = 0.8
AHEAD = 3.0
WIDTH = 0.2
RETREAT = 12.0  # nats that lr falls over a run whose retain steps alone overspend
SLACK = 0.02  # of the budget: spending that falls by less in a cycle does not fall
OVERSPENT = 1.25


def mean_of(ranks: Ranks, batches: Iterable[Any], task: Task, name: str) -> Tensor:
    """The mean loss [] of all samples of ``batches``, those of all ranks, in eval mode.

    Raises:
        ValueError: there is no sample.
    """
    model, device = ranks.model, ranks.device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model), torch.no_grad():
        prepared = task.prepared(batches, device, name)
        for batch, samples in ranks.rounds((b, task.samples(b)) for b in prepared):
            count += sum(samples)
            mine = samples[ranks.rank]
            with ranks.together(waiting=False):
                loss = None if batch is None else task.mean_loss(model, batch)
            if loss is not None and mine:
                total += mine * loss
    require(count > 0, name, "at least one sample", "none")
    return ranks.sum(total) / count


def mean_over(ranks: Ranks, batches: Iterable[Any], task: Task, name: str) -> Tensor:
    """``mean_of``, if it is finite.

    Raises:
        ValueError: it is not, or there is no sample.
    """
    mean = mean_of(ranks, batches, task, name)
    finite = bool(mean.isfinite())
    require(finite, name, "samples with finite losses", f"a mean loss of {mean.item()}")
    return mean


def holdout_scale(ranks: Ranks, holdout: Iterable[Any], task: Task) -> float:
    """The scale of a ceiling or a budget: the mean loss of samples that the model has never seen.

    Raises:
        ValueError: it is 0 or not finite, or there is no sample.
    """
    found = mean_over(ranks, holdout, task, "holdout").item()
    remedy = "hold out data the model has not learnt by heart"
    require(found > 0.0, "holdout", "a mean loss > 0", found, remedy)
    return found


@by_keyword
def retain_budget(
    model: nn.Module,
    *,
    kept: Iterable[Any],
    holdout: Iterable[Any],
    share: float = BUDGET,
    task: Task | None = None,
    group: Any = None,
) -> "Budget":
    """A budget for a loop of your own, measured now; ``unlearn(retain_budget=...)`` has one.

    After each cycle ``budget.follow(optimizer, forget_lr, cycle, of)`` looks at ``kept``, in eval
    mode, and sets the ``lr`` and ``forget_lr`` of all groups; ``budget.spent`` [] on the device is
    the share spent, 1 = all.

    Args:
        kept: batches of retain samples that the loop does not train on, read once.
        holdout: batches of samples of the same kind that the model has never seen.
        share: how far the mean loss of ``kept`` may rise, of the mean loss of ``holdout``.
        task: what one sample's loss is; None = classification.
        group: as in ``unlearn``.

    Raises:
        ValueError: bad argument, no sample, or a holdout loss that is 0 or not finite.
    """
    number("share", share, 0.0, open_low=True)
    task = as_task(task, Classification)
    if group is None and shared(model):
        group = torch.distributed.group.WORLD
    ranks = Ranks(model, group)
    budget = Budget(ranks, list(kept), task, share, holdout_scale(ranks, holdout, task))
    ranks.reshard()
    return budget


class Budget:
    """What a run may spend of the retain loss, and what it has spent."""

    def __init__(
        self, ranks: Ranks, kept: list[Any], task: Task, share: float, holdout_loss: float
    ) -> None:
        self.ranks, self.task, self.share = ranks, task, share
        prepared = task.prepared(kept, ranks.device, "kept")
        rounds = list(ranks.rounds((batch, task.samples(batch)) for batch in prepared))
        require(bool(rounds), "kept", "retain samples that are not trained on", "none")
        mine = [(batch, counts[ranks.rank]) for batch, counts in rounds if batch is not None]
        self.batches = [batch for batch, _ in mine]
        sizes = [samples for _, samples in mine]
        self.parts = torch.tensor(sizes, dtype=torch.float64, device=ranks.device)
        self.parts /= sum(sum(counts) for _, counts in rounds)
        self.limit = share * holdout_loss
        self.before = self.look()
        self.spent = torch.zeros_like(self.before)  # share of the budget, as last seen []
        self.rate = torch.ones_like(self.before)  # of the recipe's forget learning rate []

    def look(self) -> Tensor:
        """The mean retain loss [] now, of the samples of all ranks."""
        model = self.ranks.model
        with evaluating(model), torch.no_grad():
            losses = [self.task.mean_loss(model, batch).double() for batch in self.batches]
        mine = self.parts * torch.stack(losses) if losses else self.parts
        return self.ranks.sum(mine.sum())

    def follow(
        self,
        optimizer: torch.optim.Optimizer,
        forget_lr: float,
        cycle: int,
        of: int,
        idle: Tensor | None = None,
    ) -> Tensor:
        """After cycle ``cycle`` (from 1) of ``of``: look, and set both learning rates; returns what
        ``lr`` was multiplied by [].

        ``idle``: bool [], there was nothing left to forget in this cycle: the rate does not rise
        then, or the next sample that needs a step would get one that is far too long.
        """
        before = self.spent
        self.spent = (self.look() - self.before) / self.limit
        rise = self.spent - before
        ahead = self.spent + AHEAD * rise.clamp_min(0.0)
        given = min(1.0, cycle / of / RAMP)
        left = (given - ahead).nan_to_num(nan=-1.0, neginf=-1.0) / WIDTH
        most = 1.0 if idle is None else torch.where(idle, 0.0, 1.0).to(left)
        self.rate *= (GAIN / of * left.clamp_min(-FALL).clamp_max(most)).exp()
        opened = (0.5 + 0.5 * left).clamp(0.0, 1.0)
        costly = (opened == 0.0) & ~(rise < -SLACK)
        kept = torch.where(costly, math.exp(-RETREAT / of), 1.0)
        for group in optimizer.param_groups:
            group["forget_lr"] = (forget_lr * self.rate * opened).float()
            group["lr"] = (kept * group["lr"]).float()
        return kept

    def settled(self, lr: float) -> float:
        """At the end of a run the share that is spent.

        Warns:
            RuntimeWarning: it is more than ``OVERSPENT``.
        """
        spent = self.spent.item()
        if not spent <= OVERSPENT:
            warn(
                f"the run spent {spent:.2f} of its retain_budget of {self.share:g}: the learning"
                f" rates fell too late; lower lr ({lr:g}), or take more cycles"
            )
        return spent

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        numbers = {"before": self.before, "spent": self.spent, "rate": self.rate}
        return {"share": self.share, "limit": self.limit, **numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned.

        Raises:
            ValueError: it is of another budget.
        """
        same, remedy = state["share"] == self.share, "use another folder, or the run's budget"
        require(same, "retain_budget", f"the run's {state['share']}", self.share, remedy)
        self.limit = state["limit"]
        for name in ("before", "spent", "rate"):
            setattr(self, name, state[name].to(self.before))
