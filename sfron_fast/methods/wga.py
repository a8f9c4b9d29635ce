"""WGA (Wang et al., ICLR 2025, arXiv 2502.19301): ascent, tokens weighted by their probability.

    loss = mean over forget tokens of p^alpha log p

with the power constant; + retain_weight * mean l(retain). Changes the model in place and returns
it. Defaults are open-unlearning's; further keywords go to ``descend`` (weight_decay, max_norm,
on_epoch).
"""

from functools import partial
from typing import Any

from torch import nn

from ..errors import by_keyword
from ..tasks import Task
from ..weights import wga_weights
from .descent import Loader
from .weighted import forget_by_token


@by_keyword
def wga(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    alpha: float = 1.0,
    retain_weight: float = 1.0,
    epochs: int = 10,
    lr: float = 1e-5,
    **settings: Any,
) -> nn.Module:
    """WGA: what is remembered least weighs least."""
    return forget_by_token(
        model,
        partial(wga_weights, alpha=alpha),
        forget=forget,
        retain=retain,
        retain_weight=retain_weight,
        task=task,
        epochs=epochs,
        lr=lr,
        **settings,
    )
