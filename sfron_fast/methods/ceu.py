"""CE-U (Yang, arXiv 2503.01224): cross-entropy to the model's own prediction without the label.

    loss = mean over forget tokens of p / (1 - p) log p

with the odds constant; + retain_weight * mean l(retain). Changes the model in place and returns it.
lr and epochs are TOFU's; further keywords go to ``descend`` (weight_decay, max_norm, on_epoch).
"""

from typing import Any

from torch import nn

from ..errors import by_keyword
from ..tasks import Task
from ..weights import ceu_weights
from .descent import Loader
from .weighted import forget_by_token


@by_keyword
def ceu(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    retain_weight: float = 0.0,
    epochs: int = 10,
    lr: float = 1e-5,
    **settings: Any,
) -> nn.Module:
    """CE-U: the label's logit goes to minus infinity, the others keep their proportions."""
    return forget_by_token(
        model,
        ceu_weights,
        forget=forget,
        retain=retain,
        retain_weight=retain_weight,
        task=task,
        epochs=epochs,
        lr=lr,
        **settings,
    )
