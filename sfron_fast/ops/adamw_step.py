"""One step of torch.optim.AdamW or Adam, in one pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import calls, registry
from .arguments import aligned, flat_list, scalar_tensors
from .bits import dithered
from .dtypes import wide
from .interpolate import lerp
from .lists import is_flat, spread, spread_scalars
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
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    freeze_masked: bool,
    max_norm: float,
    slow_lr: float,
    numbers: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """torch.optim.AdamW (decoupled) or Adam (L2) on the masked, clipped gradient.

    ``steps`` are fp32 scalars [] beside their parameters; each counts the updates applied, so a
    skipped step leaves it. ``max_exp_avg_sqs`` empty = no AMSGrad.
    """
    lr, weight_decay, slow_lr = (lr, weight_decay, slow_lr) if numbers is None else numbers.tolist()
    skip = skip_step(norm, found_inf, skipped)
    exp_avgs, exp_avg_sqs = spread(exp_avgs, params), spread(exp_avg_sqs, params)
    max_exp_avg_sqs, slow_from = spread(max_exp_avg_sqs, params), spread(slow_from, params)
    steps = spread_scalars(steps, params)
    for i, param, grad, selected in each(params, grads, masks, slow_save):
        frozen = selected if freeze_masked else None
        p = wide(param)
        if not skip:
            steps[i].add_(1)
            step = int(steps[i])
            scale, eps_now = adam_corrections(lr, beta1, beta2, eps, step)
            factor = grad_multiplier(norm, grad_scale, max_norm, param.device, p.dtype)
            g = masked_grad(grad, selected, factor, maximize)
            new = p * (1.0 - lr * weight_decay) if decoupled else p
            if not decoupled and weight_decay != 0.0:
                g = g + p * weight_decay
            m = lerp(wide(exp_avgs[i]), g, 1.0 - beta1)
            v = wide(exp_avg_sqs[i]) * beta2 + (g * (1.0 - beta2)) * g
            narrow = exp_avgs[i].dtype == torch.bfloat16 and param.dtype == torch.float32
            for state, value in ((exp_avgs[i], m), (exp_avg_sqs[i], v)):
                store(state, dithered(value, step) if narrow else value, frozen)
            if max_exp_avg_sqs:
                v = torch.maximum(wide(max_exp_avg_sqs[i]), v)
                store(max_exp_avg_sqs[i], v, frozen)
            new = new - (m * scale) / (_sqrt(v) + eps_now)
            p = new if frozen is None else torch.where(frozen, new, p)
        param.copy_(from_slow(p, i, slow_from, slow_lr))


def _sqrt(x: Tensor) -> Tensor:
    """IEEE sqrt: torch's fp32 one may be MKL's, an ulp off; fp64, even an ulp off, rounds to the
    right fp32.
    """
    return x.to(torch.float64).sqrt().to(x.dtype)


def adam_corrections(
    lr: float, beta1: float, beta2: float, eps: float, step: int
) -> tuple[float, float]:
    """Adam's bias corrections, moved into lr and eps (Kingma and Ba, end of section 2)."""
    bias, root = 1.0 - int_power(beta1, step), math.sqrt(1.0 - int_power(beta2, step))
    return lr * root / bias if bias != 0.0 else lr * root * math.inf, eps * root


def int_power(base: float, exponent: int) -> float:
    """base ** exponent by squaring: the same bits on every processor, unlike a library's pow."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
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
    for name, state in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        aligned(name, state, params, state=True)
    aligned("max_exp_avg_sqs", max_exp_avg_sqs, params, state=True, optional=True)
    for name, state in (("exp_avg_sqs", exp_avg_sqs), ("max_exp_avg_sqs", max_exp_avg_sqs)):
        for i, (average, square) in enumerate(
            zip(spread(exp_avgs, params), spread(state, params), strict=False)
        ):
            require(
                square.dtype == average.dtype,
                f"{name}[{i}]",
                f"{average.dtype}, as its exp_avg",
                square.dtype,
            )
    if is_flat(steps, params):
        flat_list("steps", steps[0], params, len(params))
        require(steps[0].dtype == torch.float32, "steps[0]", "float32", steps[0].dtype)
    else:
        require(len(steps) == len(params), "steps", f"{len(params)} tensors", len(steps))
        scalar_tensors(params, **{f"steps[{i}]": step for i, step in enumerate(steps)})
    for name in ("beta1", "beta2"):
        number(name, scalars[name], 0.0, 1.0)
        require(scalars[name] < 1.0, name, "a number in [0, 1)", scalars[name])
    number("eps", scalars["eps"], 0.0)


SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!)[] slow_save, "
    "Tensor[] slow_from, Tensor[] masks, Tensor? norm, Tensor? grad_scale, "
    "Tensor? found_inf, *, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool maximize, bool freeze_masked, float max_norm, "
    "float slow_lr, Tensor? numbers=None, Tensor(g!)? skipped=None) -> ()"
)


registry.define("adamw_step_", SCHEMA, formula, check)


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
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
    """One fused pass of torch.optim.AdamW (``decoupled``) or Adam over a list.

    ``steps``: fp32 [] per parameter, on its device, incremented here unless the update is skipped.
    Moments as ``momentum_buffers``, those of a parameter of one dtype; averages of bf16 beside fp32
    are dithered (``bits.dithered``). ``max_exp_avg_sqs`` switches AMSGrad on. The other
    arguments are those of ``sgd_step_``.
    """
    if not params:
        return require(not grads, "grads", "0 tensors", len(grads))
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs or [],
        "steps": steps,
        "slow_save": slow_save or [],
        "slow_from": slow_from or [],
        "masks": masks or [],
    }
    calls.over_lists(
        "adamw_step_",
        lists,
        norm,
        grad_scale,
        found_inf,
        lr=calls.learning_rate(lr),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
        freeze_masked=freeze_masked,
        max_norm=max_norm,
        slow_lr=slow_lr,
        numbers=numbers,
        skipped=skipped,
        changed=("params",),
    )
