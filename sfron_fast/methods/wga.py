"""WGA (Wang et al., ICLR 2025, arXiv 2502.19301): ascent, tokens weighted by their probability.

    loss = mean over forget tokens of p^alpha log p

with the power constant; + retain_weight * mean l(retain). Changes the model in place and returns
it. Defaults are open-unlearning's; further keywords go to ``descend`` (weight_decay, max_norm,
on_epoch).
"""

from typing import Any

from torch import Tensor, nn

from ..errors import by_keyword
from ..tasks import Task
from ..weights import wga_weights
from .descent import Loader, task_or_classification
from .weighted import ascent, forget_and_retain


@by_keyword
def wga(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    alpha: float = 1.0,
    retain_weight: float = 1.0,
    epochs: int = 10,
    lr: float = 1e-5,
    **settings: Any,
) -> nn.Module:
    """WGA: what is remembered least weighs least."""
    task = task_or_classification(task)
    task.needs("units")

    def forget_loss(batch: Any, ids: Tensor) -> Tensor:
        losses = task.units_by(model, batch).losses
        return ascent(wga_weights(losses, alpha), losses)

    return forget_and_retain(
        model,
        forget_loss,
        forget=forget,
        retain=retain,
        retain_weight=retain_weight,
        task=task,
        epochs=epochs,
        lr=lr,
        **settings,
    )
