"""Averaged weights (EMA) that belong to a model: a run begins from them and ends by setting them.

After a few dozen cycles an average of .99 or slower still is the model from before them, and what
is sampled from it has forgotten nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import require


def averaged_weights(ema: Any) -> list[Tensor]:
    """The weights, in the order of the model's parameters.

    Raises:
        ValueError: neither EMAModel of diffusers nor AveragedModel of torch.
    """
    inside = getattr(ema, "module", None)
    if isinstance(inside, nn.Module):
        return list(inside.parameters())
    found = getattr(ema, "shadow_params", None)
    kind = type(ema).__name__
    require(isinstance(found, list), "ema", "EMAModel of diffusers, or AveragedModel", kind)
    assert isinstance(found, list)
    return found


def check_averaged(model: nn.Module, ema: Any) -> None:
    """Raise ValueError unless the model's weights are the averaged ones."""
    ours, theirs = list(model.parameters()), averaged_weights(ema)
    count = f"weights for {len(ours)} parameters"
    require(len(ours) == len(theirs), "ema", count, len(theirs), "pass the average of this model")
    pairs = zip(ours, theirs, strict=True)
    same = all(p.shape == e.shape and torch.equal(p, e.to(p)) for p, e in pairs)
    remedy = "copy them into the model first, with ema.copy_to(model.parameters())"
    require(same, "model", "the averaged weights of ema", "others", remedy)


def reset_averaged(model: nn.Module, ema: Any) -> None:
    """The averaged weights become the model's, and averaging begins anew."""
    with torch.no_grad():
        for mine, average in zip(model.parameters(), averaged_weights(ema), strict=True):
            average.copy_(mine)
    if hasattr(ema, "optimization_step"):
        ema.optimization_step = 0
    if hasattr(ema, "n_averaged"):
        ema.n_averaged.zero_()
