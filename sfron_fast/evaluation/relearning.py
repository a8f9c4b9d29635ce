"""What comes back: a little training on one part of what was forgotten, judged on another part."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..data.batches import model_device
from ..errors import integer, number, require
from ..models.modes import keeping_modes, recording
from ..tasks import Classification, Task
from ..tasks.task import as_task, check_depends


def relearned(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float,
    task: Task | None = None,
) -> nn.Module:
    """A copy of ``model`` after ``steps`` steps of AdamW on ``batches``; ``model`` stays as it is.

    The attack of Lynch et al. 2024 and of Hu et al. 2024. Train on one half of the forget set and
    judge the other half: a model that has truly forgotten knows of it what a retrained one does
    after the same steps. Compare with that one, not with the model before: learning to answer in
    this form helps both::

        attacked = relearned(model, one_half, steps=10, lr=3e-4, task=task)
        p = language.answer_probability(language.token_stats(attacked, other_half)).mean()

    All weights of the copy are trained, also those that are frozen in ``model``, as an attacker
    would; merge adapters before. ``lr`` stays, without weight decay. The copy is in eval mode.

    Args:
        batches: one step each, over and over; a loader that shuffles draws anew in each pass.
        task: what a sample's loss is; None = classification. The mean over the samples is
            descended.

    Raises:
        ValueError: a setting out of range, no batch with a sample in it, a loss that is not finite.
    """
    task = as_task(task, Classification)
    wanted = integer("steps", steps, 1)
    attacked = copy.deepcopy(model)
    trained = [p.requires_grad_() for p in attacked.parameters() if p.is_floating_point()]
    rate = number("lr", lr, 0.0, open_low=True)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    device = model_device(attacked)
    done = 0
    with recording(attacked), keeping_modes(attacked):
        attacked.train()
        while done < wanted:
            before = done
            for batch in task.prepared(batches, device, "batches"):
                loss = task.mean_loss(attacked, batch)
                check_depends(loss, task)
                remedy = "lower lr"
                require(bool(loss.isfinite()), "lr", "finite losses", f"{lr} with {loss}", remedy)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done == wanted:
                    break
            require(done > before, "batches", "at least one with a sample in it", "none")
    return attacked.eval()
