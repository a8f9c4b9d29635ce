"""RMU (Li et al., ICML 2024, arXiv 2403.03218): hidden states of the forget set towards a random
direction, those of the retain set where they were.

    loss = mean |h(forget) - c u|^2 + retain_weight * mean |h(retain) - h_0(retain)|^2

h the output of one layer, u a random unit vector (uniform, then normalised), the means over tokens
that count and the width. Only a few matrices move, the others are frozen meanwhile. Changes the
model in place and returns it. Defaults are the authors' for Zephyr 7B but for the names; further
keywords go to ``descend`` (weight_decay, max_norm, on_epoch).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import tensors_in
from ..errors import by_keyword, number, require
from ..models.modes import evaluating
from ..tasks import Task
from .descent import Loader, task_or_classification
from .original import Original, only
from .weighted import forget_and_retain


@by_keyword
def rmu(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    layer: str,
    trained: str,
    task: Task | None = None,
    steering: float = 6.5,
    retain_weight: float = 1200.0,
    seed: int = 0,
    epochs: int = 1,
    lr: float = 5e-5,
    **settings: Any,
) -> nn.Module:
    """RMU.

    Args:
        layer: name of the module whose output [samples, tokens, width] (or the first of a tuple) is
            steered, as ``model.named_modules()`` has it: "model.layers.7".
        trained: a regular expression that finds the names of the parameters that move, in full:
            r"model\\.layers\\.[567]\\.mlp\\.down_proj\\.weight".
        steering: c.

    Raises:
        ValueError: a module or parameters that are not there, or a setting out of range.
    """
    number("steering", steering, 0.0)
    task = task_or_classification(task)
    modules = dict(model.named_modules())
    require(layer in modules, "layer", "a name of model.named_modules()", repr(layer))
    names = [n for n, _ in model.named_parameters() if re.fullmatch(trained, n)]
    require(bool(names), "trained", "an expression that finds parameters", repr(trained))
    generator = torch.Generator().manual_seed(seed)
    direction: list[Tensor] = []

    def target(hidden: Tensor) -> Tensor:
        if not direction:
            drawn = torch.rand(hidden.shape[-1], generator=generator)
            direction.append(steering * (drawn / drawn.norm()).to(hidden))
        return direction[0].expand_as(hidden)

    def forget_loss(batch: Any, ids: Tensor) -> Tensor:
        hidden = _states(model, modules[layer], batch, task)
        return F.mse_loss(hidden, target(hidden))

    def retain_loss(batch: Any) -> Tensor:
        with original.weights(model), evaluating(model), torch.no_grad():
            before = _states(model, modules[layer], batch, task)
        return F.mse_loss(_states(model, modules[layer], batch, task), before)

    with only(model, names):
        original = Original(model)
        return forget_and_retain(
            model,
            forget_loss,
            retain_loss=retain_loss,
            forget=forget,
            retain=retain,
            retain_weight=retain_weight,
            task=task,
            epochs=epochs,
            lr=lr,
            **settings,
        )


def _states(model: nn.Module, layer: nn.Module, batch: Any, task: Task) -> Tensor:
    """What the layer says of tokens that are no padding [tokens, width]."""
    with _output(layer) as found:
        task.outputs(model, batch)
    require(len(found) == 1, "layer", "a module that runs once a pass", f"{len(found)} runs")
    hidden = found[0]
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is not None and mask.shape == hidden.shape[:-1]:
        return hidden[mask.bool()]
    return hidden.flatten(0, -2)


@contextmanager
def _output(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Where the layer's output lies after a pass."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(tensors_in(output)[0])

    handle = layer.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
