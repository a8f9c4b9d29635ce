"""What a model returns, and the model inside what wraps it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import require


def logits_of(outputs: Any, argument: str) -> Tensor:
    """The logits of a model's output: a tensor, or an output object of Hugging Face's.

    Raises:
        ValueError: there are none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    named = isinstance(outputs, Mapping) and "logits" in outputs
    logits: Any = outputs["logits"] if named else getattr(outputs, "logits", None)
    found, remedy = type(outputs).__name__, "let the model return them, or pass a task of your own"
    require(isinstance(logits, Tensor), argument, "logits", found, remedy)
    assert isinstance(logits, Tensor)
    return logits


def inner(model: Any) -> Any:
    """The model within torch.compile, DataParallel, DDP and PEFT: its attributes tell its kind."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            return model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model
