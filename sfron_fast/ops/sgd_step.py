"""One step of torch.optim.SGD, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import calls, registry
from .arguments import coded_moments, step_counts
from .dtypes import wide
from .lists import listed, spread, spread_scalars
from .moment_codes import SIGNED, decode, encode
from .step import (
    Weights,
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
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    corrections: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_save_corrections: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    slow_from_corrections: Sequence[Tensor],
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
    uninitialised. ``steps`` count the updates, for what is dithered; the other lists as of AdamW.
    """
    lr, weight_decay, slow_lr = (lr, weight_decay, slow_lr) if numbers is None else numbers.tolist()
    skip = skip_step(norm, found_inf, skipped)
    momentum_buffers, steps = spread(momentum_buffers, params), spread_scalars(steps, params)
    weights = Weights(params, corrections, params)
    save = Weights(slow_save, slow_save_corrections, params)
    slow = Weights(slow_from, slow_from_corrections, params)
    for i, param, grad, selected in each(weights, grads, masks, save):
        frozen = selected if freeze_masked else None
        step, p = int(steps[i]) + 1 if steps else 0, weights[i]
        coded = bool(scales) and scales[i].numel() > 0
        if not skip:
            if steps:
                steps[i].add_(1)
            factor = grad_multiplier(norm, grad_scale, max_norm, param.device, p.dtype)
            g = masked_grad(grad, selected, factor, maximize)
            if weight_decay != 0.0:
                g = g + p * weight_decay
            if momentum_buffers:
                buffer = momentum_buffers[i]
                old = decode(buffer, scales[i][..., 0]) if coded else wide(buffer)
                m = g if first else old * momentum + g * (1.0 - dampening)
                # frozen weights of an uninitialised buffer still need a defined value
                kept = torch.zeros_like(old) if first else old
                kept = m if frozen is None else torch.where(frozen, m, kept)
                if coded:
                    codes, scale = encode(kept, step, SIGNED)
                    buffer.copy_(codes)
                    scales[i][..., 0].copy_(scale)
                else:
                    store(buffer, kept, None if first else frozen)
                g = g + m * momentum if nesterov else m
            new = p - g * lr
            p = new if frozen is None else torch.where(frozen, new, p)
        elif first and momentum_buffers:
            momentum_buffers[i].zero_()
            if coded:
                scales[i].zero_()
        if slow or not skip:
            weights.put(i, from_slow(p, i, slow, slow_lr), step)


def check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    corrections: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_save_corrections: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    slow_from_corrections: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **scalars: Any,
) -> None:
    """What the op demands of its arguments; raises ValueError."""
    check_step(
        params,
        grads,
        corrections,
        slow_save,
        slow_save_corrections,
        slow_from,
        slow_from_corrections,
        masks,
        norm,
        grad_scale,
        found_inf,
        scalars,
    )
    moments = {"momentum_buffers": (momentum_buffers, SIGNED)}
    coded_moments(params, scales, moments, optional=True)
    require(bool(momentum_buffers) or not scales, "scales", "none without momentum", "some")
    step_counts(steps, params, optional=not (scales or corrections))
    number("momentum", scalars["momentum"], 0.0)
    number("dampening", scalars["dampening"], 0.0)


SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] scales, Tensor(d!)[] steps, Tensor(e!)[] corrections, "
    "Tensor(f!)[] slow_save, Tensor(g!)[] slow_save_corrections, Tensor[] slow_from, "
    "Tensor[] slow_from_corrections, Tensor[] masks, Tensor? norm, "
    "Tensor? grad_scale, Tensor? found_inf, *, float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize, bool first, bool freeze_masked, "
    "float max_norm, float slow_lr, Tensor? numbers=None, Tensor(h!)? skipped=None) -> ()"
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
    scales: Sequence[Tensor] | None = None,
    steps: Sequence[Tensor] | None = None,
    corrections: Sequence[Tensor] | None = None,
    slow_save_corrections: Sequence[Tensor] | None = None,
    slow_from_corrections: Sequence[Tensor] | None = None,
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
        scales: fp32 [first dimension, groups, 1] for each parameter: the buffers are then codes in
            int8 (``moment_codes``); one without elements where they are none.
        corrections: beside parameters of bf16 the rest of the weights, int8 or int16 of the same
            shape (``split_weights``); then slow weights have theirs.
        steps: fp32 [] per parameter, counted here unless the update is skipped: what is dithered
            needs them, so they must be there beside scales and corrections.

    Raises:
        ValueError, RuntimeError: a bad argument, by name, before anything is written.
    """
    params, grads = listed("params", params), listed("grads", grads)
    if not params:
        return require(not grads, "grads", "0 tensors", len(grads))
    lists = {
        "params": params,
        "grads": grads,
        "momentum_buffers": listed("momentum_buffers", momentum_buffers),
        "scales": listed("scales", scales),
        "steps": listed("steps", steps),
        "corrections": listed("corrections", corrections),
        "slow_save": listed("slow_save", slow_save),
        "slow_save_corrections": listed("slow_save_corrections", slow_save_corrections),
        "slow_from": listed("slow_from", slow_from),
        "slow_from_corrections": listed("slow_from_corrections", slow_from_corrections),
        "masks": listed("masks", masks),
    }
    calls.check_clip(norm, max_norm)
    there = bool(lists["momentum_buffers"]) or momentum == 0.0
    require(there, "momentum_buffers", "one for each parameter, with momentum", "none")
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
