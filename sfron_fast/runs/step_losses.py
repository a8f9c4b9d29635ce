"""What one step of ``unlearn`` back-propagates, on one process or on each of several ranks.

DDP and FSDP2 average gradients over the ranks, so a rank's loss is its summand of the loss of the
global batch, times their number.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..models.modes import evaluating
from ..tasks import Task
from ..tasks.task import check_depends
from ..weights import with_ceiling

LEAST = 1e-30  # a loss of 0 has no logarithm


class ForgetLoss(NamedTuple):
    """Of a forget batch; ``mean`` and ``reached`` are those of all ranks."""

    loss: Tensor  # [], to ascend
    mean: Tensor  # [], of the samples' losses
    reached: Tensor | None  # bool [], all (tokens) are at the ceiling; None without one


class StepLosses:
    """The losses of batches that ranks share; ``here``: whether this rank's batch counts."""

    def __init__(self, model: nn.Module, task: Task, ranks: Ranks, recipe: Any) -> None:
        self.model, self.task, self.ranks, self.recipe = model, task, ranks, recipe

    def forget(self, batch: Any, here: bool, reference: float | None) -> ForgetLoss:
        """The adaptive loss, normalised over the samples of all ranks; ``reference`` goes with the
        recipe's ceiling. With objective "replace" minus the mean of the task's losses of that name.

        Raises:
            ValueError: as the task does, on every rank.
        """
        recipe, task = self.recipe, self.task
        weighing = self.model, batch, recipe.temperature, recipe.loss_floor
        with self.ranks.together(waiting=False):
            own = task.usual(batch)
            usual = reference if own is None else own
            if recipe.objective == "replace":
                each = task.checked(task.replacement_losses(self.model, batch), batch)
                loss, left = -each.mean(), None
            elif recipe.ceiling is None or usual is None:
                loss, each = task.adaptive_loss(*weighing)
                left = None
            elif recipe.ceiling_of == "token":
                loss, each, left = task.token_ceiling_loss(*weighing, recipe.ceiling, usual)
            else:
                limit = recipe.ceiling, usual
                loss, each = task.ceiling_loss(*weighing, *limit)
                left = with_ceiling(torch.ones_like(each), each, *limit).any()
            check_depends(loss, task)
            each = each.detach()
        if self.ranks.group is None:
            return ForgetLoss(loss, each.mean(), None if left is None else ~left)
        counted = task.counted(self.model, batch).to(each.device) & here
        weighed = each if own is None else each / own
        temperature = recipe.temperature if recipe.objective == "ascent" else 0.0
        share = self.ranks.portion(weighed, temperature, recipe.loss_floor, counted)
        mine = each.new_tensor([0.0, len(each), 0.0], dtype=torch.float64)
        mine[0], mine[2] = each.sum(), 0.0 if left is None else left
        total, count, some = self.ranks.sum(mine if here else torch.zeros_like(mine))
        reached = None if left is None else some == 0
        return ForgetLoss(loss * share.to(loss), (total / count).to(each), reached)

    def typical(self, batch: Any, here: bool) -> Tensor:
        """The geometric mean [] of the losses that a forget step is about, in eval mode: timesteps
        whose losses differ a thousandfold count alike. Over the samples of all ranks.
        """
        task = self.task
        with evaluating(self.model), torch.no_grad(), self.ranks.together(waiting=False):
            replaces = self.recipe.objective == "replace"
            losses = task.replacement_losses if replaces else task.losses
            logs = task.checked(losses(self.model, batch), batch).double().clamp_min(LEAST).log()
        mine = torch.stack([logs.sum(), logs.new_tensor(len(logs))])
        total, count = self.ranks.sum(mine if here else torch.zeros_like(mine))
        return (total / count).exp()

    def retain(self, batch: Any, here: bool) -> tuple[Tensor, Tensor]:
        """The mean loss [] to descend, and whether it is finite: bool [].

        Raises:
            ValueError: as the task does, on every rank.
        """
        with self.ranks.together(waiting=False):
            loss = self.task.mean_loss(self.model, batch)
            check_depends(loss, self.task)
        if self.ranks.group is None:
            return loss, torch.isfinite(loss.detach())
        counted = self.task.counted(self.model, batch).to(loss.device) & here
        mine = counted.sum(dtype=torch.float64)
        total, count = self.ranks.sum(torch.stack([loss.detach() * mine, mine]))
        share = mine / count.to(mine).clamp_min(1.0) * self.ranks.size
        return loss * share.to(loss), torch.isfinite(total)
