"""How the models of the demonstrations learn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def fit(
    model: nn.Module,
    batches: Any,
    epochs: int,
    lr: float,
    *,
    loss: Callable[[Any], Tensor],
    rise: float = 0.1,
) -> float:
    """AdamW in place, its rate rising over ``rise`` of the steps and falling on a cosine after;
    what is frozen stays. The model is in eval mode then. Returns the last loss.

    Args:
        batches: with a length; drawn anew in each pass.
        loss: of one of its batches, [].
    """
    moving = [p for p in model.parameters() if p.requires_grad]
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(moving, lr=lr, weight_decay=0.01)
    # OneCycleLR divides by the length of the rise less one step: a rise of one step is none
    start = 0.0 if rise * steps == 1.0 else rise
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=start)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            found = loss(batch)
            optimizer.zero_grad()
            found.backward()
            torch.nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    return found.item()
