"""GA (Thudi et al., EuroS&P 2022, as SFR-on's paper runs it): gradient ascent, max over theta of
the mean cross-entropy of the forget set.

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18. Further keywords go to ``descend`` (momentum, weight_decay, max_norm, on_epoch).
"""

from typing import Any

from torch import nn

from ..tasks import Task
from .descent import Loader, descend, mean_losses, task_or_classification


def gradient_ascent(
    model: nn.Module,
    forget: Loader,
    *,
    task: Task | None = None,
    epochs: int = 9,
    lr: float = 1e-4,
    max_norm: float = 0.1,
    **settings: Any,
) -> nn.Module:
    """GA: clipped ascent on the forget set, BatchNorm in eval mode, lr constant."""
    losses = mean_losses(model, forget, "forget", task_or_classification(task), sign=-1.0)
    settings = {"cosine": False, "training": False, "max_norm": max_norm, **settings}
    return descend(model, losses, epochs=epochs, lr=lr, **settings)
