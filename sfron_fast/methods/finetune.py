"""FT (Warnecke et al., NDSS 2023, as SFR-on's paper runs it): fine-tuning, min over theta of the
mean cross-entropy of the retain set.

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18. Further keywords go to ``descend`` (momentum, weight_decay, max_norm, on_epoch).
"""

from typing import Any

from torch import nn

from .descent import Loader, cross_entropies, descend


def finetune(
    model: nn.Module, retain: Loader, *, epochs: int = 10, lr: float = 0.01, **settings: Any
) -> nn.Module:
    """FT: go on training on the retain set."""
    return descend(
        model,
        cross_entropies(model, retain, "retain"),
        epochs=epochs,
        lr=lr,
        **settings,
    )
