"""One step of torch.optim.AdamW or Adam, in one pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import calls, registry
from .arguments import aligned, coded_moments, step_counts
from .bits import dithered
from .dtypes import wide
from .interpolate import lerp
from .lists import listed, spread, spread_scalars
from .moment_codes import SIGNED, UNSIGNED, decode, encode
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
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
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
    skipped step leaves it. ``max_exp_avg_sqs`` empty = no AMSGrad; ``corrections`` empty = weights
    are what parameters are; ``scales``, or one of them, empty = moments are no codes.
    """
    lr, weight_decay, slow_lr = (lr, weight_decay, slow_lr) if numbers is None else numbers.tolist()
    skip = skip_step(norm, found_inf, skipped)
    exp_avgs, exp_avg_sqs = spread(exp_avgs, params), spread(exp_avg_sqs, params)
    max_exp_avg_sqs, steps = spread(max_exp_avg_sqs, params), spread_scalars(steps, params)
    weights = Weights(params, corrections, params)
    save = Weights(slow_save, slow_save_corrections, params)
    slow = Weights(slow_from, slow_from_corrections, params)
    for i, param, grad, selected in each(weights, grads, masks, save):
        frozen = selected if freeze_masked else None
        step, p = int(steps[i]) + 1, weights[i]
        if not skip:
            steps[i].add_(1)
            scale, eps_now = adam_corrections(lr, beta1, beta2, eps, step)
            factor = grad_multiplier(norm, grad_scale, max_norm, param.device, p.dtype)
            g = masked_grad(grad, selected, factor, maximize)
            new = p * (1.0 - lr * weight_decay) if decoupled else p
            if not decoupled and weight_decay != 0.0:
                g = g + p * weight_decay
            coded = bool(scales) and scales[i].numel() > 0
            old = [
                decode(state, scales[i][..., k]) if coded else wide(state)
                for k, state in enumerate((exp_avgs[i], exp_avg_sqs[i]))
            ]
            m = lerp(old[0], g, 1.0 - beta1)
            v = old[1] * beta2 + (g * (1.0 - beta2)) * g
            wider = param.dtype == torch.float32 or bool(corrections)
            narrow = exp_avgs[i].dtype == torch.bfloat16 and wider
            for k, (state, value) in enumerate(((exp_avgs[i], m), (exp_avg_sqs[i], v))):
                if coded:
                    kept = value if frozen is None else torch.where(frozen, value, old[k])
                    codes, factors = encode(kept, step, state.dtype)
                    state.copy_(codes)
                    scales[i][..., k].copy_(factors)
                else:
                    store(state, dithered(value, step) if narrow else value, frozen)
            if max_exp_avg_sqs:
                v = torch.maximum(wide(max_exp_avg_sqs[i]), v)
                store(max_exp_avg_sqs[i], v, frozen)
            new = new - (m * scale) / (_sqrt(v) + eps_now)
            p = new if frozen is None else torch.where(frozen, new, p)
        if slow or not skip:
            weights.put(i, from_slow(p, i, slow, slow_lr), step)


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
    moments = {"exp_avgs": (exp_avgs, SIGNED), "exp_avg_sqs": (exp_avg_sqs, UNSIGNED)}
    coded_moments(params, scales, moments)
    aligned("max_exp_avg_sqs", max_exp_avg_sqs, params, state=True, optional=True)
    require(
        not (scales and max_exp_avg_sqs), "max_exp_avg_sqs", "none beside scales", "some of them"
    )
    for name, state in (("exp_avg_sqs", exp_avg_sqs), ("max_exp_avg_sqs", max_exp_avg_sqs)):
        for i, (average, square) in enumerate(
            zip(spread(exp_avgs, params), spread(state, params), strict=False)
        ):
            alike = square.dtype == average.dtype or average.dtype == SIGNED
            require(alike, f"{name}[{i}]", f"{average.dtype}, as its exp_avg", square.dtype)
    step_counts(steps, params)
    for name in ("beta1", "beta2"):
        number(name, scalars[name], 0.0, 1.0)
        require(scalars[name] < 1.0, name, "a number in [0, 1)", scalars[name])
    number("eps", scalars["eps"], 0.0)


SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] scales, Tensor(f!)[] steps, "
    "Tensor(g!)[] corrections, Tensor(h!)[] slow_save, Tensor(i!)[] slow_save_corrections, "
    "Tensor[] slow_from, Tensor[] slow_from_corrections, Tensor[] masks, "
    "Tensor? norm, Tensor? grad_scale, "
    "Tensor? found_inf, *, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool maximize, bool freeze_masked, float max_norm, "
    "float slow_lr, Tensor? numbers=None, Tensor(j!)? skipped=None) -> ()"
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
    scales: Sequence[Tensor] | None = None,
    corrections: Sequence[Tensor] | None = None,
    slow_save_corrections: Sequence[Tensor] | None = None,
    slow_from_corrections: Sequence[Tensor] | None = None,
) -> None:
    """One fused pass of torch.optim.AdamW (``decoupled``) or Adam over a list.

    ``steps``: fp32 [] per parameter, on its device, incremented here unless the update is skipped.
    Moments as ``momentum_buffers``, those of a parameter of one dtype; averages of bf16 beside fp32
    are dithered (``bits.dithered``). ``max_exp_avg_sqs`` switches AMSGrad on. The other
    arguments are those of ``sgd_step_``.

    ``scales``: fp32 [first dimension, groups, 2] for each parameter: exp_avg is then codes in int8
    and exp_avg_sq in uint8 (``moment_codes``); one without elements where they are none.
    ``corrections``: beside parameters of bf16 the rest of the weights, int8 or int16 of the same
    shape (``split_weights``); then slow weights have theirs.
    """
    params, grads = listed("params", params), listed("grads", grads)
    if not params:
        return require(not grads, "grads", "0 tensors", len(grads))
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": listed("exp_avgs", exp_avgs),
        "exp_avg_sqs": listed("exp_avg_sqs", exp_avg_sqs),
        "max_exp_avg_sqs": listed("max_exp_avg_sqs", max_exp_avg_sqs),
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
