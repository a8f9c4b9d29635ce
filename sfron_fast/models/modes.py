"""How a model runs: its training flags, and whether autograd records."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import require

Modes = dict[nn.Module, bool]  # every submodule's own training flag


def modes_of(model: nn.Module) -> Modes:
    """The training flags as they are."""
    return {module: module.training for module in model.modules()}


def set_modes(model: nn.Module, modes: Modes) -> None:
    """Put flags back."""
    model.train(modes[model])  # first: modules that override train() undo what their eval() did
    for module, training in modes.items():
        module.training = training


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Every submodule's own training flag restored after, also after an error."""
    modes = modes_of(model)
    try:
        yield
    finally:
        set_modes(model, modes)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every submodule's own training flag restored after."""
    with keeping_modes(model):
        model.eval()
        yield


def training_modes(model: nn.Module) -> Modes:
    """The flags that training steps run with: the one policy of ``unlearn`` and the baselines.

    A model that comes in training mode keeps each submodule's mode as found, so a BatchNorm or
    Dropout put to eval() stays so. One that comes in eval mode, as evaluation leaves it, is put to
    train() as a whole, as the authors do.
    """
    if model.training:
        return modes_of(model)
    with keeping_modes(model):
        model.train()
        return modes_of(model)


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Autograd records inside, also for a caller under ``torch.no_grad`` or
    ``torch.inference_mode``.

    Raises:
        ValueError: the model was made under ``torch.inference_mode``; autograd can never record for
            it.
    """
    never = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    require(
        not never,
        "model",
        "parameters that autograd can record for",
        f"inference tensors ({', '.join(never[:3])})",
        "make or load the model outside torch.inference_mode",
    )
    with torch.inference_mode(False), torch.enable_grad():
        yield
