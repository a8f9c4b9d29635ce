"""SalUn (Fan et al., ICLR 2024): the mask m = 1[|sum of forget gradients| >= gamma], and random
labelling in which only the weights of m move.

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18. Further keywords go to ``descend`` (momentum, weight_decay, max_norm, on_epoch).
"""

from typing import Any

import torch
from torch import nn

from ..errors import by_keyword
from ..models.modes import evaluating, recording
from ..saliency.mask import SaliencyMask
from ..tasks import Task
from .descent import Loader, mean_losses, task_or_classification
from .random_label import random_label


@by_keyword
def salun(
    model: nn.Module,
    *,
    forget: Loader,
    mixed: Loader,
    task: Task | None = None,
    fraction: float = 0.2,
    epochs: int = 10,
    lr: float = 0.007,
    **settings: Any,
) -> nn.Module:
    """SalUn: RL in which only the ``fraction`` of weights of ``gradient_saliency`` move.

    The others keep their bits, as in the authors' code since they made the mask a hard constraint;
    before, it masked gradients only, and weight decay moved all weights.

    ``mixed`` as for ``random_label``; ``forget`` has the true labels.
    """
    mask = gradient_saliency(model, forget, fraction, task=task)
    return random_label(model, mixed, task=task, epochs=epochs, lr=lr, mask=mask, **settings)


def gradient_saliency(
    model: nn.Module, forget: Loader, fraction: float = 0.5, *, task: Task | None = None
) -> SaliencyMask:
    """SalUn's mask: the ``fraction`` of weights where the forget batches' gradients sum to most, in
    eval mode.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with evaluating(model), recording(model):
        sums = {n: torch.zeros_like(p) for n, p in named.items()}
        for loss in mean_losses(model, forget, "forget", task_or_classification(task))(0):
            grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            torch._foreach_add_(list(sums.values()), list(grads))
    size = {n: s.float().abs() for n, s in sums.items()}
    ones = {n: torch.ones_like(s) for n, s in size.items()}
    return SaliencyMask.top_k(forget=size, retain=ones, fraction=fraction)
