"""SatImp (Yang et al., ICML 2025, arXiv 2505.11953): tokens by saturation and importance.

    loss = mean over forget tokens of p^beta1 (1 - p)^beta2 log p

with the powers constant; + retain_weight * mean l(retain). Changes the model in place and returns
it. Defaults are open-unlearning's; further keywords go to ``descend`` (weight_decay, max_norm,
on_epoch).
"""

from functools import partial
from typing import Any

from torch import nn

from ..errors import by_keyword
from ..tasks import Task
from ..weights import satimp_weights
from .descent import Loader
from .weighted import forget_by_token


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
    return forget_by_token(
        model,
        partial(satimp_weights, beta1=beta1, beta2=beta2),
        forget=forget,
        retain=retain,
        retain_weight=retain_weight,
        task=task,
        epochs=epochs,
        lr=lr,
        **settings,
    )
