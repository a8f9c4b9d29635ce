"""SatImp (Yang et al., ICML 2025, arXiv 2505.11953): tokens by saturation and importance.

    loss = mean over forget tokens of p^beta1 (1 - p)^beta2 log p

with the powers constant; + retain_weight * mean l(retain). Changes the model in place and returns
it. Defaults are open-unlearning's; further keywords go to ``descend`` (weight_decay, max_norm,
on_epoch).
"""

from typing import Any

from torch import Tensor, nn

from ..errors import by_keyword
from ..tasks import Task
from ..weights import satimp_weights
from .descent import Loader, task_or_classification
from .weighted import ascent, forget_and_retain


@by_keyword
def satimp(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    beta1: float = 5.0,
    beta2: float = 1.0,
    retain_weight: float = 0.1,
    epochs: int = 10,
    lr: float = 1e-5,
    **settings: Any,
) -> nn.Module:
    """SatImp: neither what is forgotten nor what is wholly certain weighs much."""
    task = task_or_classification(task)
    task.needs("units")

    def forget_loss(batch: Any, ids: Tensor) -> Tensor:
        losses = task.units_by(model, batch).losses
        return ascent(satimp_weights(losses, beta1, beta2), losses)

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
