"""Small things every pass over data needs: device, eval mode, progress, checked batches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checks import require


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter, else of the first buffer, else the CPU."""
    return next(model.parameters(), next(model.buffers(), torch.empty(0))).device


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Every submodule's own training flag restored after, also after an error."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        model.train(flags[model])  # first: modules that override train() undo what their eval() did
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every submodule's own training flag restored after."""
    with keeping_modes(model):
        model.eval()
        yield


def move(batch: Any, device: torch.device, name: str = "loader") -> tuple[Any, Tensor]:
    """(inputs, targets) of the loader called ``name``, on ``device``."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    require(pair, name, "batches (inputs, targets)", type(batch).__name__)
    inputs, targets = batch
    require(hasattr(inputs, "to"), name, "inputs with a method to(device)", type(inputs).__name__)
    require(targets.dim() > 0, name, "targets [samples, ...]", "one number")
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def check_labels(output: Tensor, targets: Tensor) -> None:
    """A label that is no class, before it reaches a kernel; on other devices the loss itself objects."""
    require(targets.dtype == torch.int64, "targets", "int64 labels", targets.dtype)
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        classes = output.shape[1]
        require(low >= 0 and high < classes, "targets", f"classes 0 to {classes - 1}", f"{low} to {high}")


def progress_bar(steps: Iterable[Any], sized: Any, title: str, show: bool) -> Iterable[Any]:
    """``steps``, with a tqdm bar if ``show`` and tqdm is installed."""
    if not show:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc=title, total=len(sized) if hasattr(sized, "__len__") else None, leave=False)
