"""GradDiff (Liu et al., CoLLAs 2022; as TOFU runs it): ascent on the forget set and descent on the
retain set, in one step.

    loss = -mean l(forget) + retain_weight * mean l(retain)

Changes the model in place and returns it. Defaults are TOFU's; further keywords go to ``descend``
(weight_decay, max_norm, on_epoch). Departure: a mean is over samples, each the mean over its
tokens; TOFU's is over the tokens of a batch.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import by_keyword
from ..tasks import Task
from .descent import Loader, task_or_classification
from .weighted import forget_and_retain


@by_keyword
def grad_diff(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    retain_weight: float = 1.0,
    epochs: int = 10,
    lr: float = 1e-5,
    **settings: Any,
) -> nn.Module:
    """GradDiff: the mean forget loss up and the mean retain loss down."""
    task = task_or_classification(task)

    def forget_loss(batch: Any, ids: Tensor) -> Tensor:
        return -task.mean_loss(model, batch)

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
