"""Adaptive losses: each sample is weighted by its own, detached loss (README equations 4 and 5,
paper
eps~).

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
from .ops import differentiable, in_place, reference
from .ops import registry as ops
from .ops.arguments import FLOAT32_MAX
from .ops.layout import in_memory

LOSS_FLOOR = 1e-6  # a loss of exactly 0 would take all the weight and give no gradient


def adaptive_weights(
    losses: Tensor, temperature: float = 0.5, floor: float = LOSS_FLOOR, *, group: Any = None
) -> Tensor:
    """Weights [samples] = max(l_i, floor)^-temperature / sum_j max(l_j, floor)^-temperature,
    detached,
    fp32.

    For any per-sample loss of your own: ``(adaptive_weights(l) * l).sum()``. ``group``: as
    ``adaptive_cross_entropy``.

    Raises:
        ValueError: not [samples], empty, or a temperature or floor out of range.
    """
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    some = losses.dim() == 1 and (losses.numel() > 0 or group is not None)
    require(some, "losses", "[samples], at least one", tuple(losses.shape))
    require(losses.is_floating_point(), "losses", "a floating dtype", losses.dtype)
    wide = losses.detach().to(reference.accumulate_dtype(losses.dtype))
    weights, log_normaliser = reference.adaptive_weights(wide, temperature, floor)
    return weights if group is None else weights * _portion(log_normaliser, group)


def adaptive_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 0.5,
    *,
    floor: float = LOSS_FLOOR,
    ignore_index: int = -100,
    inplace: bool = False,
    group: Any = None,
) -> Tensor:
    """sum_i w_i l_i [] of per-sample cross-entropies, forward and backward fused.

    Args: logits: [samples, classes], or [samples, tokens, classes] for sequences (a sample's loss
        is the mean
            over its labelled tokens); fp32, bf16, fp16 or fp64; the arithmetic is at least fp32.
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
    Raises: ValueError, RuntimeError: wrong shape, dtype, device, range, or (on the CPU) a label
        that is no class.
    """
    if group is not None and logits.shape[0] == 0:
        return _nothing(logits, group)
    loss, _, _, log_normaliser = _cross_entropy(
        logits, labels, temperature, floor, ignore_index, inplace
    )
    return loss if group is None else loss * _portion(log_normaliser, group).to(loss.dtype)


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
    over = inplace and in_place.wanted(logits)
    if over:
        in_place.check(logits)
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    kernel = in_place.CrossEntropy.apply if over else _kernel("adaptive_cross_entropy", logits)
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
    r_i
    [].

    The least memory traffic: the logits are read once, and this forward pass leaves the gradient in
    their place, so afterwards they hold no logits. The division by the normaliser is left to the
    optimizer: ``total.backward(); opt.grad_scale = normaliser; opt.forget_step(); opt.grad_scale =
    None`` is the step on ``scale * adaptive_cross_entropy(...)``, provided that every gradient of
    the step comes from such totals and that nobody else sets ``grad_scale``. Over several batches
    it is the sum of their normalisers.

    Args: logits: [samples, classes]; contiguous, and no leaf. Without grad, or compiled, nothing is
        written. scale: the factor of the gradient, as -forget_weight. Any other, like -2 in ``(-2 *
        total).backward()``, is
            applied too, but costs another pass over the gradient.
        group: ranks that average their gradients: the normaliser returned is then the average of
            theirs, the same for each; dividing by it is the one division of the whole batch. A rank
            may have no samples.
        The others: as ``adaptive_cross_entropy``. Without any label the normaliser is 0, and the
        step is skipped.
    Raises: ValueError, RuntimeError: as ``adaptive_cross_entropy``, or weights that the logits'
        dtype cannot hold.
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
            return total, _mean(own, group)
        nothing = logits.sum(dtype=reference.accumulate_dtype(logits.dtype))
        return nothing, _mean(nothing, group)
    _check_rows(logits, labels, temperature, floor)
    number("scale", scale, -FLOAT32_MAX, FLOAT32_MAX)
    if not in_place.wanted(logits):
        loss, _, _, normaliser = adaptive_cross_entropy_parts(
            logits, labels, temperature, floor=floor, ignore_index=ignore_index
        )
        return loss * normaliser * scale, normaliser
    in_place.check(logits)
    _check_range(logits.dtype, float(temperature), float(floor), float(scale))
    return in_place.CrossEntropySum.apply(
        logits.unsqueeze(1),
        labels.unsqueeze(1).contiguous(),
        float(temperature),
        float(floor),
        ignore_index,
        float(scale),
    )


def _check_rows(logits: Tensor, labels: Tensor, temperature: float, floor: float) -> None:
    require(
        logits.dim() in (2, 3),
        "logits",
        "[samples, classes] or [samples, tokens, classes]",
        tuple(logits.shape),
    )
    require(
        labels.shape == logits.shape[:-1],
        "labels",
        f"shape {tuple(logits.shape[:-1])}",
        tuple(labels.shape),
    )
    require(
        logits.shape[0] > 0,
        "logits",
        "at least one sample",
        tuple(logits.shape),
        "skip empty batches",
    )
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)


def _check_range(dtype: torch.dtype, temperature: float, floor: float, scale: float) -> None:
    """What the normaliser has not divided yet must fit: the weights fp32, and the gradient the
    logits'
    dtype.

    Nor may the weights of a forgotten batch all vanish, as nothing would be left to divide by. No
    class's gradient exceeds the weight times min(l, 1), as 1 - exp(-l) is what the label's
    probability lacks.
    """
    if scale == 0.0:
        return
    low, size = min(math.log10(floor), 0.0), math.log10(abs(scale))
    weight, gradient = size - temperature * low, size + max((1.0 - temperature) * low, 0.0)
    wide_dtype = reference.accumulate_dtype(dtype)
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


def adaptive_mse(
    prediction: Tensor,
    target: Tensor,
    temperature: float = 0.5,
    *,
    floor: float = LOSS_FLOOR,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor:
    """sum_i w_i l_i [] of per-sample squared errors (diffusion models).

    Args:
        prediction, target: [samples, ...], equal shape and dtype; ``target`` must not require grad.
        reduction: "mean" or "sum" over a sample's elements.
        group: as ``adaptive_cross_entropy``.
    Raises:
        ValueError, RuntimeError: wrong shape, dtype, device or range.
    """
    require(
        prediction.shape == target.shape,
        "target",
        f"shape {tuple(prediction.shape)}",
        tuple(target.shape),
    )
    require(prediction.dim() > 1, "prediction", "[samples, ...]", tuple(prediction.shape))
    some = prediction.shape[0] > 0 or group is not None
    require(some, "prediction", "at least one sample", tuple(prediction.shape))
    require(
        not target.requires_grad,
        "target",
        "a constant",
        "requires_grad=True",
        "pass target.detach()",
    )
    require(reduction in ("mean", "sum"), "reduction", "'mean' or 'sum'", repr(reduction))
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    if prediction.shape[0] == 0:
        return _nothing(prediction, group)
    op = _kernel("adaptive_mse", prediction)
    rows, targets = in_memory(prediction.flatten(1)), in_memory(target.flatten(1))
    loss, _, _, log_normaliser = op(
        rows, targets, float(temperature), float(floor), reduction == "mean"
    )
    return loss if group is None else loss * _portion(log_normaliser, group).to(loss.dtype)


# --- ranks that share a batch: what each back-propagates is averaged ------------------------------


def _mean(normaliser: Tensor, group: Any) -> Tensor:
    """The ranks' average, the same bits on each."""
    mean = normaliser.detach().clone()
    torch.distributed.all_reduce(mean, group=group)
    return mean / torch.distributed.get_world_size(group)


def _portion(log_normaliser: Tensor, group: Any) -> Tensor:
    """What turns a rank's own average into its summand of the whole batch's, times the number of
    ranks. fp64.

    Of the logarithms, so that no temperature overflows; a NaN of one rank is every rank's.
    """
    own, ranks = log_normaliser.detach().reshape(1), torch.distributed.get_world_size(group)
    everyone = own.new_empty(ranks)
    torch.distributed.all_gather_into_tensor(everyone, own, group=group)
    portion = (own[0] - everyone.logsumexp(dim=0)).exp() * ranks
    return torch.where(
        own[0] == -math.inf, 0.0, portion
    )  # no labelled sample here, nor perhaps anywhere


def _nothing(source: Tensor, group: Any) -> Tensor:
    """The summand of a rank without samples: 0, with a gradient, which the other ranks wait for."""
    nothing = source.sum(dtype=reference.accumulate_dtype(source.dtype))
    return nothing * _portion(nothing.new_full((), -math.inf, dtype=torch.float64), group).to(
        nothing.dtype
    )


def soft_target_kl(
    logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """sum_i w_i T^2 KL(softmax(teacher_i / T) || softmax(logits_i / T)) [], forward and backward
    fused.

    What students of a teacher minimise (Hinton et al. 2015): the bad teacher of BT, and SCRUB,
    which ascends it too.

    Args: logits: [samples, classes]; fp32, bf16, fp16 or fp64; the arithmetic is at least fp32.
        teacher_logits: of the same shape and dtype; must not require grad. -inf forbids a class,
        which then adds
            nothing; where only ``logits`` forbid it the loss is inf.
        weights: [samples], detached, any sign (negative = ascent); None = 1 / samples each. Rows of
            weight 0 have no part in anything, whatever their logits.
        temperature: T > 0. T^2 keeps the gradient's size independent of it.
    Raises:
        ValueError, RuntimeError: wrong shape, dtype, device or range.
    """
    shape = tuple(logits.shape)
    require(
        logits.dim() == 2,
        "logits",
        "[samples, classes]",
        shape,
        "flatten the tokens of sequences into samples",
    )
    require(logits.shape[0] > 0, "logits", "at least one sample", shape, "skip empty batches")
    require(
        teacher_logits.shape == logits.shape,
        "teacher_logits",
        f"shape {shape}",
        tuple(teacher_logits.shape),
    )
    require(
        not teacher_logits.requires_grad,
        "teacher_logits",
        "a constant",
        "requires_grad=True",
        "run the teacher under torch.no_grad()",
    )
    number("temperature", temperature, 0.0, open_low=True)
    if weights is not None:
        weights = weights.detach().to(reference.accumulate_dtype(logits.dtype)).contiguous()
    op = _kernel("soft_target_kl", logits)
    return op(in_memory(logits), in_memory(teacher_logits), weights, float(temperature))[0]


def _kernel(name: str, source: Tensor) -> Any:
    """The op; what torch itself differentiates where there is no kernel (fp64) or torch looks
    inside.
    """
    own = source.dtype == torch.float64 or differentiable.wanted()
    return getattr(differentiable if own else ops, name)
