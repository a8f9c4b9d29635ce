"""FT and GA, the two simplest baselines: descent on the retain set, ascent on the forget set."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..batches import evaluating, model_device, move
from ..checks import number, require


def finetune(
    model: nn.Module,
    retain_loader: Iterable[Any],
    *,
    epochs: int = 10,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    on_epoch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """FT: SGD on the retain set with a cosine schedule per epoch, in place. Defaults: the authors', CIFAR-10.

    ``on_epoch(epoch, model)`` is called after every epoch.
    """
    require(isinstance(epochs, int) and epochs > 0, "epochs", "an integer > 0", repr(epochs))
    number("lr", lr, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(epochs):
        model.train()
        _epoch(model, retain_loader, optimizer, "retain_loader", sign=1.0)
        schedule.step()
        if on_epoch is not None:
            on_epoch(epoch + 1, model)
    return model


def gradient_ascent(
    model: nn.Module,
    forget_loader: Iterable[Any],
    *,
    epochs: int = 9,
    lr: float = 1e-4,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    max_norm: float = 0.1,
    on_epoch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """GA: clipped SGD ascent on the forget set, BatchNorm in eval mode, in place. Defaults: the authors', CIFAR-10.

    ``on_epoch(epoch, model)`` is called after every epoch.
    """
    require(isinstance(epochs, int) and epochs > 0, "epochs", "an integer > 0", repr(epochs))
    number("lr", lr, 0.0)
    number("max_norm", max_norm, 0.0, open_low=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    with evaluating(model):
        for epoch in range(epochs):
            _epoch(model, forget_loader, optimizer, "forget_loader", sign=-1.0, max_norm=max_norm)
            if on_epoch is not None:
                on_epoch(epoch + 1, model)
    return model


def _epoch(
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    sign: float,
    max_norm: float | None = None,
) -> None:
    device, empty = model_device(model), True
    for batch in loader:
        inputs, targets = move(batch, device, name)
        optimizer.zero_grad()
        (sign * F.cross_entropy(model(inputs), targets)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        empty = False
    require(not empty, name, "at least one batch", "an empty loader", "check the split and drop_last")
