"""Adaptive losses: each sample is weighted by its own, detached loss.

docs/equations.md, 4 and 5; paper: eps~.

Samples the model still remembers (small loss) get most of the weight. The result is sum_i w_i l_i
with sum_i w_i = 1; ascend it by minimising its negative, ``(-alpha * loss).backward()``.

A NaN among the losses shows: it makes the normaliser, every weight (but those of samples without a
label, which stay 0) and the result NaN, on every rank of a group. Second derivatives,
``torch.func`` and forward mode have the right values, from slower operations; gradients written
over the logits have no second derivative, and say so.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .errors import number, require
from .ops import adaptive_cross_entropy as cross_entropy
from .ops import adaptive_cross_entropy_over as over_logits
from .ops import rows
from .ops.adaptive_mse import adaptive_mse, adaptive_mse_parts
from .ops.adaptive_weights import LOSS_FLOOR, adaptive_weights, mean, nothing_of, portion
from .ops.arguments import FLOAT32_MAX
from .ops.dtypes import accumulate_dtype
from .ops.layout import in_memory
from .ops.soft_target_kl import soft_target_kl

__all__ = [
    "LOSS_FLOOR",
    "adaptive_cross_entropy",
    "adaptive_cross_entropy_parts",
    "adaptive_cross_entropy_sum_",
    "adaptive_mse",
    "adaptive_mse_parts",
    "adaptive_weights",
    "soft_target_kl",
]


def adaptive_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 0.5,
    *,
    floor: float = LOSS_FLOOR,
    ignore_index: int = -100,
    inplace: bool = False,
    group: Any = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """sum_i w_i l_i [] of per-sample cross-entropies, forward and backward fused.

    Args:
        logits: [samples, classes], or [samples, tokens, classes] for sequences (a sample's loss is
            the mean over its labelled tokens); fp32, bf16, fp16 or fp64; the arithmetic is at least
            fp32.
        labels: int64 [samples] or [samples, tokens]; ``ignore_index`` marks tokens without a label.
        temperature: lambda >= 0; 0 = plain mean. Any: the weights are formed relative to the
            smallest loss.
        floor: smallest loss used in a weight, > 0.
        inplace: the backward pass writes the gradient over the logits instead of into new memory;
            equal in all bits (but in fp64). Until then the logits are whole. They must be
            contiguous and no leaf; without grad, or compiled, nothing is written. A second backward
            pass raises, as does one through what saved the logits.
        group: process group whose ranks share the batch and average their gradients (DDP, FSDP2):
            the weights are then normalised over the samples of all of them, by one division. The
            mean of the ranks' results is the loss. A rank may have fewer samples, or none: logits
            [0, ...].
        label_smoothing: refused unless 0: smoothed losses of remembered samples are far from 0, and
            all alike, so that the weights would no longer tell which are remembered.

    Raises:
        ValueError, RuntimeError: wrong shape, dtype, device, range, or (on the CPU) a label that is
            no class.
    """
    if label_smoothing != 0.0:
        wanted = "0, as smoothed losses do not tell which samples are remembered"
        remedy = "smooth the retain loss alone: F.cross_entropy(..., label_smoothing=...)"
        require(False, "label_smoothing", wanted, label_smoothing, remedy)
    if group is not None and logits.shape[0] == 0:
        return nothing_of(logits, group)
    loss, _, _, log_normaliser = _cross_entropy(
        logits, labels, temperature, floor, ignore_index, inplace
    )
    return loss if group is None else loss * portion(log_normaliser, group).to(loss.dtype)


def adaptive_cross_entropy_parts(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 0.5,
    *,
    floor: float = LOSS_FLOOR,
    ignore_index: int = -100,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``adaptive_cross_entropy``, returning (loss [], losses [samples], weights [samples],
    normaliser []).

    Gradient accumulation and data parallelism: back-propagate ``loss * normaliser`` of every part
    and divide once by the sum of the normalisers, which is the weight over the whole batch. They
    are sums of max(l_i, floor)^-temperature, and inf or 0 where the loss's dtype cannot hold that
    (fp32: from a temperature of 6.5 on, with the default floor); the weights and the loss have no
    such limit.
    """
    loss, losses, weights, log_normaliser = _cross_entropy(
        logits, labels, temperature, floor, ignore_index, inplace
    )
    return loss, losses, weights, log_normaliser.exp().to(loss.dtype)


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    floor: float,
    ignore_index: int,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], losses [samples], weights [samples], log_normaliser []"""
    _check_rows(logits, labels, temperature, floor)
    over = inplace and over_logits.wanted(logits)
    if over:
        over_logits.check_logits(logits)
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    if over:
        kernel = over_logits.CrossEntropy.apply
    else:
        kernel = rows.kernel("adaptive_cross_entropy", cross_entropy.differentiable, logits)
    return kernel(
        in_memory(logits), in_memory(labels), float(temperature), float(floor), ignore_index
    )[:4]


def adaptive_cross_entropy_sum_(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 0.5,
    *,
    scale: float = 1.0,
    floor: float = LOSS_FLOOR,
    ignore_index: int = -100,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """scale * sum_i r_i l_i [] with r_i = max(l_i, floor)^-temperature, and the normaliser sum_i
    r_i [].

    The least memory traffic: the logits are read once, and this forward pass leaves the gradient in
    their place, so afterwards they hold no logits. The division by the normaliser is left to the
    optimizer: ``total.backward(); opt.grad_scale = normaliser; opt.forget_step(); opt.grad_scale =
    None`` is the step on ``scale * adaptive_cross_entropy(...)``, provided that every gradient of
    the step comes from such totals and that nobody else sets ``grad_scale``. Over several batches
    it is the sum of their normalisers.

    Args:
        logits: [samples, classes]; contiguous, and no leaf. Without grad, or compiled, nothing is
            written.
        scale: the factor of the gradient, as -forget_weight. Any other, like -2 in ``(-2 *
            total).backward()``, is applied too, but costs another pass over the gradient.
        group: ranks that average their gradients: the normaliser returned is then the average of
            theirs, the same for each; dividing by it is the one division of the whole batch. A rank
            may have no samples.

    The other arguments: as ``adaptive_cross_entropy``. Without any label the normaliser is 0, and
    the step is skipped.

    Raises:
        ValueError, RuntimeError: as ``adaptive_cross_entropy``, or weights that the logits' dtype
            cannot hold.
    """
    require(
        logits.dim() == 2,
        "logits",
        "[samples, classes]",
        tuple(logits.shape),
        "for sequences use adaptive_cross_entropy(inplace=True)",
    )
    if group is not None:
        if logits.shape[0] > 0:
            total, own = adaptive_cross_entropy_sum_(
                logits, labels, temperature, scale=scale, floor=floor, ignore_index=ignore_index
            )
            return total, mean(own, group)
        nothing = logits.sum(dtype=accumulate_dtype(logits.dtype))
        return nothing, mean(nothing, group)
    _check_rows(logits, labels, temperature, floor)
    number("scale", scale, -FLOAT32_MAX, FLOAT32_MAX)
    if not over_logits.wanted(logits):
        loss, _, _, normaliser = adaptive_cross_entropy_parts(
            logits, labels, temperature, floor=floor, ignore_index=ignore_index
        )
        return loss * normaliser * scale, normaliser
    over_logits.check_logits(logits)
    _check_range(logits.dtype, float(temperature), float(floor), float(scale))
    return over_logits.CrossEntropySum.apply(
        logits.unsqueeze(1),
        labels.unsqueeze(1).contiguous(),
        float(temperature),
        float(floor),
        ignore_index,
        float(scale),
    )


def _check_rows(logits: Tensor, labels: Tensor, temperature: float, floor: float) -> None:
    shape, fits = logits.shape, logits.dim() in (2, 3)
    if not fits or labels.shape != shape[:-1] or shape[0] == 0:
        known = "[samples, classes] or [samples, tokens, classes]"
        require(fits, "logits", known, tuple(shape))
        wanted = tuple(shape[:-1])
        require(labels.shape == wanted, "labels", f"shape {wanted}", tuple(labels.shape))
        remedy = "skip empty batches"
        require(shape[0] > 0, "logits", "at least one sample", tuple(shape), remedy)
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)


def _check_range(dtype: torch.dtype, temperature: float, floor: float, scale: float) -> None:
    """What the normaliser has not divided yet must fit: the weights fp32, and the gradient the
    logits' dtype.

    Nor may the weights of a forgotten batch all vanish, as nothing would be left to divide by. No
    class's gradient exceeds the weight times min(l, 1), as 1 - exp(-l) is what the label's
    probability lacks.
    """
    if scale == 0.0:
        return
    low, size = min(math.log10(floor), 0.0), math.log10(abs(scale))
    weight, gradient = size - temperature * low, size + max((1.0 - temperature) * low, 0.0)
    wide_dtype = accumulate_dtype(dtype)
    wide, narrow = (math.log10(torch.finfo(d).max) for d in (wide_dtype, dtype))
    require(
        weight < wide and gradient < narrow,
        "floor",
        f"weights below 1e{wide:.1f} and gradients below 1e{narrow:.1f}",
        f"up to 1e{weight:.1f} and 1e{gradient:.1f} by scale, floor and temperature",
        "raise it, or use adaptive_cross_entropy(inplace=True)",
    )
    vanishing = size - 2.0 * temperature
    require(
        vanishing > math.log10(torch.finfo(wide_dtype).tiny),
        "temperature",
        f"weights of losses up to 100 above {torch.finfo(wide_dtype).tiny:.0e}",
        f"1e{vanishing:.1f}",
        "lower it, or use adaptive_cross_entropy(inplace=True)",
    )
