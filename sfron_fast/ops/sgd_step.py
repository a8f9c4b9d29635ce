"""One step of torch.optim.SGD, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import calls, registry
from .arguments import aligned
from .dtypes import wide
from .lists import spread
from .step import (
    check_step,
    each,
    from_slow,
    grad_multiplier,
    masked_grad,
    skip_step,
    store,
)


def formula(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    freeze_masked: bool,
    max_norm: float,
    slow_lr: float,
    numbers: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """torch.optim.SGD on the masked, clipped gradient; ``first`` = the momentum buffers are
    uninitialised.
    """
    lr, weight_decay, slow_lr = (lr, weight_decay, slow_lr) if numbers is None else numbers.tolist()
    skip = skip_step(norm, found_inf, skipped)
    momentum_buffers, slow_from = spread(momentum_buffers, params), spread(slow_from, params)
    for i, param, grad, selected in each(params, grads, masks, slow_save):
        frozen = selected if freeze_masked else None
        p = wide(param)
        if not skip:
            factor = grad_multiplier(norm, grad_scale, max_norm, param.device, p.dtype)
            g = masked_grad(grad, selected, factor, maximize)
            if weight_decay != 0.0:
                g = g + p * weight_decay
            if momentum_buffers:
                m = g if first else wide(momentum_buffers[i]) * momentum + g * (1.0 - dampening)
                # frozen weights of an uninitialised buffer still need a defined value
                store(
                    momentum_buffers[i],
                    torch.where(frozen, m, 0.0) if first and frozen is not None else m,
                    None if first else frozen,
                )
                g = g + m * momentum if nesterov else m
            new = p - g * lr
            p = new if frozen is None else torch.where(frozen, new, p)
        elif first and momentum_buffers:
            momentum_buffers[i].zero_()
        param.copy_(from_slow(p, i, slow_from, slow_lr))


def check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **scalars: Any,
) -> None:
    """What the op demands of its arguments; raises ValueError."""
    check_step(params, grads, slow_save, slow_from, masks, norm, grad_scale, found_inf, scalars)
    aligned("momentum_buffers", momentum_buffers, params, state=True, optional=True)
    number("momentum", scalars["momentum"], 0.0)
    number("dampening", scalars["dampening"], 0.0)


SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] slow_save, Tensor[] slow_from, Tensor[] masks, Tensor? norm, "
    "Tensor? grad_scale, Tensor? found_inf, *, float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize, bool first, bool freeze_masked, "
    "float max_norm, float slow_lr, Tensor? numbers=None, Tensor(d!)? skipped=None) -> ()"
)


registry.define("sgd_step_", SCHEMA, formula, check)


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    masks: Sequence[Tensor] | None = None,
    freeze_masked: bool = False,
    norm: Tensor | None = None,
    max_norm: float = float("inf"),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    slow_save: Sequence[Tensor] | None = None,
    slow_from: Sequence[Tensor] | None = None,
    slow_lr: float = 1.0,
    numbers: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """One fused pass of torch.optim.SGD over a list: unscale, mask, clip, decay, momentum, update,
    interpolate.

    Args:
        params, grads: tensors of equal shape, dtype, device.
        momentum_buffers: parameter-shaped, fp32 or the parameter's dtype, beside fp32 also bf16;
            ``first`` marks them uninitialised.
        masks: packed uint8 [ceil(n / 8)] each; deselected gradients count as zero, and with
            ``freeze_masked`` their weights and state keep their bits.
        norm: fp32 [], from ``masked_grad_norm``; clips to ``max_norm``; not finite = the update is
            skipped.
        grad_scale, found_inf: fp32 [], torch.amp's; gradients are divided by the first, skipped by
            the second.
        slow_save: receives the parameters as they were before the step (start of a cycle).
        slow_from, slow_lr: with them the result is slow + slow_lr (updated - slow) (end of a
            cycle).
        numbers: fp64 [3] on the parameters' device: lr, weight_decay and slow_lr in place of the
            numbers, so that a captured CUDA graph follows a schedule.
        skipped: int64 [] there, one more if the update is skipped.

    Raises:
        ValueError, RuntimeError: a bad argument, by name, before anything is written.
    """
    if not params:
        return require(not grads, "grads", "0 tensors", len(grads))
    lists = {
        "params": params,
        "grads": grads,
        "momentum_buffers": momentum_buffers or [],
        "slow_save": slow_save or [],
        "slow_from": slow_from or [],
        "masks": masks or [],
    }
    calls.over_lists(
        "sgd_step_",
        lists,
        norm,
        grad_scale,
        found_inf,
        lr=calls.learning_rate(lr),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        first=first,
        freeze_masked=freeze_masked,
        max_norm=max_norm,
        slow_lr=slow_lr,
        numbers=numbers,
        skipped=skipped,
        changed=("params",),
    )
