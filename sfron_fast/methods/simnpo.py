"""SimNPO (Fan et al., arXiv 2410.07163): NPO without a reference, by the length of the sequence.

    loss = -2 / beta log sigmoid(-beta / |y| log p - gamma)

the mean over forget sequences; + retain_weight * mean l(retain). Changes the model in place and
returns it. Defaults are open-unlearning's; further keywords go to ``descend`` (weight_decay,
max_norm, on_epoch).
"""

from typing import Any

from torch import Tensor, nn

from ..errors import by_keyword
from ..tasks import Task
from ..weights import simnpo_weights
from .descent import Loader, task_or_classification
from .weighted import ascent, forget_and_retain, sums


@by_keyword
def simnpo(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    beta: float = 4.5,
    gamma: float = 0.0,
    retain_weight: float = 1.0,
    epochs: int = 10,
    lr: float = 1e-5,
    **settings: Any,
) -> nn.Module:
    """SimNPO: a sequence weighs less the less likely its tokens are on average."""
    task = task_or_classification(task)
    task.needs("units")

    def forget_loss(batch: Any, ids: Tensor) -> Tensor:
        units = task.units_by(model, batch)
        losses = sums(units)
        return ascent(simnpo_weights(losses, units.lengths, beta, gamma), losses)

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
