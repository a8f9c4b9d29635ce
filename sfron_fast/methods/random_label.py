"""RL (Golatkar et al., CVPR 2020, in the form of SalUn's code): min over theta of the mean
cross-entropy of the retain set and of the forget set under wrong labels.

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18. Further keywords go to ``descend`` (momentum, weight_decay, max_norm, on_epoch).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import require
from ..tasks import Task
from .descent import Loader, descend, mean_losses, task_or_classification


def random_label(
    model: nn.Module,
    mixed: Loader,
    *,
    task: Task | None = None,
    epochs: int = 10,
    lr: float = 0.003,
    **settings: Any,
) -> nn.Module:
    """RL: train on the retain set and the forget set under one fixed wrong label each
    (``wrong_labels``).

    ``mixed``: batches of both, shuffled together.
    """
    losses = mean_losses(model, mixed, "mixed", task_or_classification(task))
    return descend(model, losses, epochs=epochs, lr=lr, **settings)


def wrong_labels(labels: Tensor, classes: int, generator: torch.Generator | None = None) -> Tensor:
    """One label of the other ``classes - 1`` for each of int64 [samples], evenly drawn, on the
    labels' device.
    """
    require(classes > 1, "classes", "an integer > 1", classes)
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return (labels + shift.to(labels.device)) % classes
