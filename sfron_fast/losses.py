"""Adaptive losses: each sample is weighted by its own, detached loss (README equations 4 and 5, paper eps~).

Samples the model still remembers (small loss) get most of the weight. The result is sum_i w_i l_i with
sum_i w_i = 1; ascend it by minimising its negative, ``(-alpha * loss).backward()``.
"""

import torch
from torch import Tensor

from . import ops, reference
from .checks import number, require

LOSS_FLOOR = 1e-6  # a loss of exactly 0 would take all the weight and give no gradient


def adaptive_weights(losses: Tensor, temperature: float = 0.5, floor: float = LOSS_FLOOR) -> Tensor:
    """Weights [samples] = max(l_i, floor)^-temperature / sum_j max(l_j, floor)^-temperature, detached, fp32.

    For any per-sample loss of your own: ``(adaptive_weights(l) * l).sum()``.

    Raises:
        ValueError: not [samples], empty, or a temperature or floor out of range.
    """
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    require(losses.dim() == 1 and losses.numel() > 0, "losses", "[samples], at least one", tuple(losses.shape))
    require(losses.is_floating_point(), "losses", "a floating dtype", losses.dtype)
    wide = losses.detach().to(reference.accumulate_dtype(losses.dtype))
    return reference.adaptive_weights(wide, temperature, floor)[0]


def adaptive_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 0.5,
    *,
    floor: float = LOSS_FLOOR,
    ignore_index: int = -100,
) -> Tensor:
    """sum_i w_i l_i [] of per-sample cross-entropies, forward and backward fused.

    Args:
        logits: [samples, classes], or [samples, tokens, classes] for sequences (a sample's loss is the mean
            over its labelled tokens); fp32, bf16, fp16 or fp64; the arithmetic is at least fp32.
        labels: int64 [samples] or [samples, tokens]; ``ignore_index`` marks tokens without a label.
        temperature: lambda >= 0; 0 = plain mean.
        floor: smallest loss used in a weight, > 0.
    Raises:
        ValueError, RuntimeError: wrong shape, dtype, device, range, or (on the CPU) a label that is no class.
    """
    loss, *_ = _cross_entropy(logits, labels, temperature, floor, ignore_index)
    return loss


def adaptive_cross_entropy_parts(
    logits: Tensor, labels: Tensor, temperature: float = 0.5, *, floor: float = LOSS_FLOOR, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``adaptive_cross_entropy``, returning (loss [], losses [samples], weights [samples], normaliser []).

    Gradient accumulation and data parallelism: back-propagate ``loss * normaliser`` of every part and divide
    once by the sum of the normalisers, which is the weight over the whole batch.
    """
    return _cross_entropy(logits, labels, temperature, floor, ignore_index)


def _cross_entropy(
    logits: Tensor, labels: Tensor, temperature: float, floor: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require(logits.dim() in (2, 3), "logits", "[samples, classes] or [samples, tokens, classes]", tuple(logits.shape))
    require(labels.shape == logits.shape[:-1], "labels", f"shape {tuple(logits.shape[:-1])}", tuple(labels.shape))
    require(logits.shape[0] > 0, "logits", "at least one sample", tuple(logits.shape), "skip empty batches")
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    op = _kernel("adaptive_cross_entropy", logits)
    loss, losses, weights, normaliser, _ = op(
        logits.contiguous(), labels.contiguous(), float(temperature), float(floor), ignore_index
    )
    return loss, losses, weights, normaliser


def adaptive_mse(
    prediction: Tensor,
    target: Tensor,
    temperature: float = 0.5,
    *,
    floor: float = LOSS_FLOOR,
    reduction: str = "mean",
) -> Tensor:
    """sum_i w_i l_i [] of per-sample squared errors (diffusion models).

    Args:
        prediction, target: [samples, ...], equal shape and dtype; ``target`` must not require grad.
        reduction: "mean" or "sum" over a sample's elements.
    Raises:
        ValueError, RuntimeError: wrong shape, dtype, device or range.
    """
    require(prediction.shape == target.shape, "target", f"shape {tuple(prediction.shape)}", tuple(target.shape))
    require(prediction.dim() > 1, "prediction", "[samples, ...]", tuple(prediction.shape))
    require(prediction.shape[0] > 0, "prediction", "at least one sample", tuple(prediction.shape))
    require(not target.requires_grad, "target", "a constant", "requires_grad=True", "pass target.detach()")
    require(reduction in ("mean", "sum"), "reduction", "'mean' or 'sum'", repr(reduction))
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    op = _kernel("adaptive_mse", prediction)
    rows, targets = prediction.flatten(1).contiguous(), target.flatten(1).contiguous()
    return op(rows, targets, float(temperature), float(floor), reduction == "mean")[0]


def _kernel(name: str, source: Tensor):
    """The op; for fp64 the reference itself, whose operations autograd knows."""
    if source.dtype != torch.float64:
        return getattr(ops, name)
    return _DOUBLE[name]


def _double_cross_entropy(logits: Tensor, labels: Tensor, *scalars):
    ops.checks.adaptive_cross_entropy(logits, labels, *scalars)
    # autograd multiplies by 0 where the formula selects, and 0 times an ignored inf is NaN
    logits = logits.where((labels != scalars[-1]).unsqueeze(2), 0.0)
    return _constant_weights(reference.adaptive_cross_entropy(logits, labels, *scalars))


def _double_mse(prediction: Tensor, target: Tensor, *scalars):
    ops.checks.adaptive_mse(prediction, target, *scalars)
    return _constant_weights(reference.adaptive_mse(prediction, target, *scalars))


def _constant_weights(parts):
    _, losses, weights, *rest = parts
    weights = weights.detach()
    return ((weights * losses).sum(), losses.detach(), weights, *[r.detach() for r in rest])


_DOUBLE = {"adaptive_cross_entropy": _double_cross_entropy, "adaptive_mse": _double_mse}
