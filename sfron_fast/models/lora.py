"""Low-rank adapters (LoRA, arXiv 2106.09685) without another package, on modules where they are.

    y = x W^T + b + scale * dropout(x) A^T B^T,    A [rank, in], B [out, rank], scale = alpha / rank

The module stays the same object with the same weight; A and B are parameters of it, and a forward
hook adds their part: no gradient as large as W is ever made, and state dicts keep their names.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import integer, number, require
from .linear import is_linear, matrix

A, B, SCALE, DROPOUT, HOOK = "lora_A", "lora_B", "lora_scale", "lora_dropout", "lora_hook"


def adapters_in(model: nn.Module) -> list[str]:
    """The names of A and B, ours or those of peft."""
    return [name for name, _ in model.named_parameters() if A in name or B in name]


def add_lora(
    model: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> list[str]:
    """Adapters on every linear layer (``nn.Linear``, Hugging Face's ``Conv1D``) but the output
    head and what shares its weight with another module. The outputs stay: A is drawn from
    ``seed`` as ``nn.Linear`` draws its weight, B is 0. Returns their names.

    Raises:
        ValueError: a setting out of range, adapters that are there already, no such layer.
    """
    rank = integer("rank", rank, 1)
    alpha, dropout = number("alpha", alpha, 0.0, open_low=True), number("dropout", dropout, 0.0, 1)
    there = adapters_in(model)
    require(not there, "model", "one without adapters", f"{len(there)}", "merge them before")
    layers = _layers(model)
    found = type(model).__name__
    require(bool(layers), "model", "one with nn.Linear layers besides its head", found)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        weight = layer.weight
        rows, columns = matrix(layer).shape
        drawn = torch.empty(rank, columns).uniform_(-1.0, 1.0, generator=generator)
        down = (drawn / math.sqrt(columns)).to(weight)
        layer.register_parameter(A, nn.Parameter(down))
        layer.register_parameter(B, nn.Parameter(weight.new_zeros(rows, rank)))
        setattr(layer, SCALE, alpha / rank)
        setattr(layer, DROPOUT, dropout)
        setattr(layer, HOOK, layer.register_forward_hook(_add))
    return adapters_in(model)


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Within, the model is what it was before ``add_lora``, bit for bit."""
    scales = {layer: getattr(layer, SCALE) for layer in _adapted(model)}
    try:
        for layer in scales:
            setattr(layer, SCALE, 0.0)
        yield
    finally:
        for layer, scale in scales.items():
            setattr(layer, SCALE, scale)


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """W + scale * B A in the place of W, and no adapters any more; in place. Rounds as W does."""
    for layer in _adapted(model):
        change = getattr(layer, SCALE) * (getattr(layer, B) @ getattr(layer, A))
        matrix(layer).add_(change)
    return drop_lora(model)


def drop_lora(model: nn.Module) -> nn.Module:
    """No adapters any more, and what they learnt is lost; in place."""
    for layer in _adapted(model):
        getattr(layer, HOOK).remove()
        for name in (A, B, SCALE, DROPOUT, HOOK):
            delattr(layer, name)
    return model


def _add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    scale = getattr(layer, SCALE)
    if scale == 0.0:
        return output
    x = F.dropout(inputs[0], getattr(layer, DROPOUT), layer.training)
    return output + scale * F.linear(F.linear(x, getattr(layer, A)), getattr(layer, B))


def _adapted(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, HOOK)]


def _layers(model: Any) -> list[Any]:
    """What gets an adapter."""
    users: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users[id(p)] = users.get(id(p), 0) + 1
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        layer
        for layer in model.modules()
        if is_linear(layer) and layer is not head and users[id(layer.weight)] == 1
    ]
