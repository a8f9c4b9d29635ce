"""FT (Warnecke et al., NDSS 2023, as SFR-on's paper runs it): fine-tuning, min over theta of the
mean loss of the retain set.

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18. Further keywords go to ``descend`` (momentum, weight_decay, max_norm, on_epoch).
"""

from typing import Any

from torch import nn

from ..tasks import Task
from .descent import Loader, descend, mean_losses, task_or_classification


def finetune(
    model: nn.Module,
    retain: Loader,
    *,
    task: Task | None = None,
    epochs: int = 10,
    lr: float = 0.01,
    **settings: Any,
) -> nn.Module:
    """FT: go on training on the retain set."""
    losses = mean_losses(model, retain, "retain", task_or_classification(task))
    return descend(model, losses, epochs=epochs, lr=lr, **settings)
