"""Linear layers, whichever way their weights lie: ``nn.Linear``, and Hugging Face's ``Conv1D``."""

from typing import Any

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Of either kind."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix(layer: Any) -> Tensor:
    """The weight as [out, in], in its memory and without gradients; a Conv1D has its own turned."""
    weight: Tensor = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.T
