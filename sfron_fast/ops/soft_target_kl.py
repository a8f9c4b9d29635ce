"""Divergence from soft targets: teachers of BT and SCRUB (Hinton et al. 2015)."""

from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import registry
from .arguments import aligned, floats
from .dtypes import accumulate_dtype, wide
from .layout import in_memory
from .rows import gradient_kernel, gradient_of, kernel, like_second, row_shift, sample_outputs


def formula(
    logits: Tensor, teacher_logits: Tensor, weights: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i w_i l_i, l_i = T^2 KL(softmax(teacher_i / T) || softmax(logits_i / T)) -> loss, losses,
    log_sums.

    logits, teacher_logits [samples, classes]; weights [samples] of any sign, None = 1 / samples.
    losses [samples] and log_sums [4, samples] are 0 where the weight is; the latter are the logits'
    maximum (0 where that is infinite) and log sum e^((x - maximum) / T), then the teacher's. All in
    fp32 (fp64 for fp64). A class without probability for the teacher adds nothing, whatever its
    logit.
    """
    weights = _row_weights(weights, logits)
    counted = (weights != 0).unsqueeze(1)
    pair = [torch.where(counted, wide(x), 0.0) for x in (logits, teacher_logits)]
    shifts = [row_shift(x) for x in pair]
    relative = [(x - s.unsqueeze(1)) / temperature for x, s in zip(pair, shifts, strict=True)]
    sums = [torch.where(counted.squeeze(1), x.exp().sum(dim=1).log(), 0.0) for x in relative]
    log_q, log_p = (x - s.unsqueeze(1) for x, s in zip(relative, sums, strict=True))
    p = log_p.exp()
    losses = torch.where(counted & (p != 0), p * (log_p - log_q), 0.0).sum(dim=1) * temperature**2
    return (weights * losses).sum(), losses, torch.stack([shifts[0], sums[0], shifts[1], sums[1]])


def gradient(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> Tensor:
    """d loss / d logits = grad * w_i * T * (softmax(logits / T) - softmax(teacher / T)); 0 where
    the weight is 0.
    """
    weights = _row_weights(weights, logits)
    row = (weights * temperature * grad).unsqueeze(1)
    q, p = (
        ((wide(x) - shift.unsqueeze(1)) / temperature - log_sum.unsqueeze(1)).exp()
        for x, shift, log_sum in ((logits, *log_sums[:2]), (teacher_logits, *log_sums[2:]))
    )
    return torch.where(weights.unsqueeze(1) != 0, (q - p) * row, 0.0).to(logits.dtype)


def _row_weights(weights: Tensor | None, logits: Tensor) -> Tensor:
    """[samples]"""
    if weights is not None:
        return weights
    samples = logits.shape[0]
    return logits.new_full((samples,), 1.0 / max(samples, 1), dtype=accumulate_dtype(logits.dtype))


def check(
    logits: Tensor, teacher_logits: Tensor, weights: Tensor | None, temperature: float
) -> None:
    """What the op demands of its arguments; raises ValueError."""
    require(
        logits.dim() == 2 and logits.shape[1] > 0,
        "logits",
        "[samples, classes]",
        tuple(logits.shape),
    )
    floats("logits", [logits])
    aligned("teacher_logits", [teacher_logits], [logits])
    if weights is not None:
        wanted = accumulate_dtype(logits.dtype)
        require(
            weights.shape == logits.shape[:1],
            "weights",
            f"shape {tuple(logits.shape[:1])}",
            tuple(weights.shape),
        )
        require(weights.dtype == wanted, "weights", f"dtype {wanted}", weights.dtype)
        require(
            weights.device == logits.device, "weights", f"device {logits.device}", weights.device
        )
    number("temperature", temperature, 0.0, open_low=True)


def check_gradient(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> None:
    """What the op of the gradient demands beyond that."""
    require(grad.numel() == 1, "grad", "one element", tuple(grad.shape))
    shape = (4, logits.shape[0])
    require(log_sums.shape == shape, "log_sums", f"shape {shape}", tuple(log_sums.shape))


SCHEMA = (
    "(Tensor logits, Tensor teacher_logits, Tensor? weights, "
    "float temperature) -> (Tensor loss, Tensor losses, Tensor log_sums)"
)


GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor logits, Tensor teacher_logits, Tensor? weights, Tensor log_sums, "
    "float temperature) -> Tensor"
)


def fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Empty outputs, for torch.compile."""
    loss, losses, *_ = sample_outputs(logits)
    return loss, losses, losses.new_empty((4, logits.shape[0]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Only the loss has a gradient; the weights are constants."""
    logits, teacher_logits, weights, ctx.temperature = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for outputs without a gradient, at every call
    ctx.save_for_backward(logits, teacher_logits, weights, output[2])


def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    """The gradient of the first argument."""
    if grad is None:
        return (None,) * 4
    derive = gradient_kernel("soft_target_kl_backward", differentiable_gradient)
    found = derive(grad, *ctx.saved_tensors, ctx.temperature)
    return found, None, None, None


registry.define(
    "soft_target_kl", SCHEMA, formula, check, fake=fake, backward=(setup_context, backward)
)
registry.define(
    "soft_target_kl_backward", GRADIENT_SCHEMA, gradient, check_gradient, fake=like_second
)


def differentiable(logits: Tensor, *constants: Any) -> tuple[Tensor, ...]:
    """Checked; of its outputs only the loss has a gradient."""
    check(logits, *constants)
    loss, *others = formula(logits, *constants)
    return loss, *(t.detach() for t in others)


def differentiable_gradient(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> Tensor:
    """The gradient, itself a function of ``grad`` and ``logits``."""
    return gradient_of(formula(logits, teacher_logits, weights, temperature)[0], logits, grad)


def soft_target_kl(
    logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """sum_i w_i T^2 KL(softmax(teacher_i / T) || softmax(logits_i / T)) [], forward and backward
    fused.

    What students of a teacher minimise (Hinton et al. 2015): the bad teacher of BT, and SCRUB,
    which ascends it too.

    Args:
        logits: [samples, classes]; fp32, bf16, fp16 or fp64; the arithmetic is at least fp32.
        teacher_logits: of the same shape and dtype; must not require grad. -inf forbids a class,
            which then adds nothing; where only ``logits`` forbid it the loss is inf.
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
        weights = weights.detach().to(accumulate_dtype(logits.dtype)).contiguous()
    op = kernel("soft_target_kl", differentiable, logits)
    return op(in_memory(logits), in_memory(teacher_logits), weights, float(temperature))[0]
