"""Buffers, such as BatchNorm's statistics, kept before a step and put back after it: also ones that
the step made.
"""

from typing import Any

import torch
from torch import Tensor, nn

Kept = list[tuple[nn.Module, dict[str, Tensor | None]]]


def keep_buffers(model: nn.Module) -> Kept:
    """A copy of every buffer."""
    return [
        (
            module,
            {
                name: None if b is None else b.detach().clone()
                for name, b in module._buffers.items()
            },
        )
        for module in model.modules()
    ]


@torch.no_grad()
def put_back(kept: Kept, unless: Tensor | None = None) -> None:
    """Every buffer as it was kept, or as it is where the bool tensor ``unless`` is true.

    ``unless`` is read on the device. Only for buffers that were made, replaced by another shape or
    removed since does the host wait for it: those are made or removed again.
    """
    for module, before in kept:
        others = []
        for name in dict.fromkeys((*before, *module._buffers)):
            now, then = module._buffers.get(name), before.get(name)
            if now is None and then is None:
                continue
            if now is None or then is None or _kind(now) != _kind(then):
                others.append(name)
            else:
                now.copy_(then if unless is None else torch.where(unless.to(now.device), now, then))
        if others and (unless is None or not bool(unless)):
            for name in others:
                if name in before:
                    module._buffers[name] = before[name]
                else:
                    delattr(module, name)


def _kind(buffer: Tensor) -> tuple[Any, ...]:
    return buffer.shape, buffer.dtype, buffer.device


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that ``state_dict`` leaves out (``persistent=False``), by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


@torch.no_grad()
def fit_buffers(model: nn.Module, saved: dict[str, Any], *, persistent: bool) -> None:
    """Make buffers of the shapes saved, where a forward pass of the saved model had made or
    enlarged them.

    ``saved``: name -> value, among them buffers; parameters and what is no tensor are left alone.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, value in saved.items():
        path, _, leaf = name.rpartition(".")
        if (
            name in parameters
            or path not in modules
            or leaf == "_extra_state"
            or not isinstance(value, Tensor)
        ):
            continue
        module = modules[path]
        now = module._buffers.get(leaf)
        same = now is not None and (now.shape, now.dtype) == (value.shape, value.dtype)
        if not same and (leaf in module._buffers or not hasattr(module, leaf)):
            module.register_buffer(leaf, value.clone(), persistent=persistent)


@torch.no_grad()
def set_unsaved_buffers(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put back what ``unsaved_buffers`` returned."""
    fit_buffers(model, saved, persistent=False)
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])
