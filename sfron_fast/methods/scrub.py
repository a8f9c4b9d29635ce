"""SCRUB (Kurmanji et al., NeurIPS 2023): away from the original on the forget set, near it and its
labels on the retain set, in turn.

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18. Further keywords go to ``descend`` (momentum, weight_decay, max_norm, on_epoch).
"""

import copy
from typing import Any

from torch import nn

from ..errors import by_keyword
from ..losses import soft_target_kl
from ..tasks import Task
from .descent import Loader, batches, descend, task_or_classification, teach


@by_keyword
def scrub(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    ascent_epochs: int = 2,
    temperature: float = 4.0,
    label_weight: float = 0.99,
    teacher_weight: float = 0.001,
    epochs: int = 6,
    lr: float = 8e-5,
    **settings: Any,
) -> nn.Module:
    """SCRUB: in the first epochs away from the original on the forget set; in each, near it on the
    retain set.
    """
    task = task_or_classification(task)
    task.needs("losses_of", "logits")
    original = copy.deepcopy(model)

    def divergence(outputs: Any, batch: Any) -> Any:
        teacher = teach(original, batch, task)
        return soft_target_kl(task.logits(outputs, batch), teacher, temperature=temperature)

    def losses(epoch: int) -> Any:
        if epoch < ascent_epochs:
            for batch in batches(model, forget, "forget", task):
                yield -divergence(task.outputs(model, batch), batch)
        for batch in batches(model, retain, "retain", task):
            outputs = task.outputs(model, batch)
            near = divergence(outputs, batch)
            loss = task.checked(task.losses_of(outputs, batch), batch).mean()
            yield label_weight * loss + teacher_weight * near

    return descend(model, losses, epochs=epochs, lr=lr, **settings)
