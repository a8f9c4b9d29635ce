"""SCRUB (Kurmanji et al., NeurIPS 2023): away from the original on the forget set, near it and its
labels on the retain set, in turn.

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18. Further keywords go to ``descend`` (momentum, weight_decay, max_norm, on_epoch).
"""

import copy
from typing import Any

from torch import nn

from ..data.batches import call, cross_entropy
from ..errors import by_keyword
from ..losses import soft_target_kl
from .descent import Loader, batches, descend, teach


@by_keyword
def scrub(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
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
    original = copy.deepcopy(model)

    def losses(epoch: int) -> Any:
        if epoch < ascent_epochs:
            for inputs, _ in batches(model, forget, "forget"):
                yield -soft_target_kl(
                    call(model, inputs), teach(original, inputs), temperature=temperature
                )
        for inputs, labels in batches(model, retain, "retain"):
            logits = call(model, inputs)
            near = soft_target_kl(logits, teach(original, inputs), temperature=temperature)
            yield label_weight * cross_entropy(logits, labels) + teacher_weight * near

    return descend(model, losses, epochs=epochs, lr=lr, **settings)
