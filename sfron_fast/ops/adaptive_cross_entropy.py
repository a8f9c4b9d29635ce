"""Cross-entropies of samples, weighted by themselves: docs/equations.md, 4 and 5."""

from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import adaptive_weights, registry
from .arguments import floats
from .dtypes import accumulate_dtype, wide
from .rows import (
    constant_weights,
    gradient_kernel,
    gradient_of,
    like_second,
    row_shift,
    sample_outputs,
)


def cross_entropy_log_sums(wide: Tensor, labels: Tensor) -> Tensor:
    """wide [samples, tokens, classes], labels [samples, tokens] -> [2, samples, tokens]: shift, log
    sum e^(x - shift).

    The classes beside the label are added apart: what is small beside the e^0 of a label that is
    the maximum, the loss of a remembered sample, keeps its digits.
    """
    shift = row_shift(wide)
    relative, label = wide - shift.unsqueeze(2), labels.unsqueeze(2)
    rest = relative.exp().scatter(2, label, 0.0).sum(dim=2)
    return torch.stack(
        [shift, torch.log1p(rest + torch.expm1(relative.gather(2, label).squeeze(2)))]
    )


def formula(
    logits: Tensor, labels: Tensor, temperature: float, floor: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [samples, tokens, classes], labels [samples, tokens] -> loss, losses, weights,
    log_normaliser, log_sums.

    A sample's loss is the mean over its tokens with a label; a sample without one has loss and
    weight 0. losses, weights [samples], log_sums [2, samples, tokens] (a row's maximum, or 0 where
    that is infinite, and log sum e^(x - maximum)) in fp32 (fp64 for fp64); log_normaliser [] as
    ``adaptive_weights``, fp64.
    """
    values = wide(logits)
    counted = labels != ignore_index
    known = torch.where(counted, labels, 0)
    shift, log_sum = log_sums = cross_entropy_log_sums(values, known)
    picked = values.gather(2, known.unsqueeze(2)).squeeze(2)
    tokens = counted.sum(dim=1)
    losses = torch.where(counted, log_sum - (picked - shift), 0.0).sum(dim=1) / tokens.clamp_min(1)
    weights, log_normaliser = adaptive_weights.formula(losses, temperature, floor, tokens > 0)
    return (weights * losses).sum(), losses, weights, log_normaliser, log_sums


def gradient(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> Tensor:
    """d loss / d logits = grad * w_i / tokens_i * (softmax - onehot); weights are constants.

    At the label softmax - 1 = expm1(-loss), which keeps the digits of a small loss.
    """
    counted = (labels != ignore_index).unsqueeze(2)
    label = torch.where(counted, labels.unsqueeze(2), 0)
    row = (
        torch.where(
            counted, (weights / counted.sum(dim=1).clamp_min(1).squeeze(1)).view(-1, 1, 1), 0.0
        )
        * grad
    )
    shift, log_sum = log_sums.unsqueeze(3)
    log_softmax = (wide(logits) - shift) - log_sum
    delta = log_softmax.exp().scatter(2, label, log_softmax.gather(2, label).expm1())
    return torch.where(counted, delta * row, 0.0).to(logits.dtype)


def check(
    logits: Tensor, labels: Tensor, temperature: float, floor: float, ignore_index: int
) -> None:
    """What the op demands of its arguments; raises ValueError."""
    require(
        logits.dim() == 3 and logits.shape[2] > 0,
        "logits",
        "[samples, tokens, classes]",
        tuple(logits.shape),
    )
    floats("logits", [logits])
    require(
        labels.shape == logits.shape[:2],
        "labels",
        f"shape {tuple(logits.shape[:2])}",
        tuple(labels.shape),
    )
    require(labels.dtype == torch.int64, "labels", "int64", labels.dtype)
    require(labels.device == logits.device, "labels", f"device {logits.device}", labels.device)
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    if adaptive_weights.readable(labels):
        outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= logits.shape[2]))]
        if outside.numel():
            require(
                False,
                "labels",
                f"classes 0 to {logits.shape[2] - 1} or {ignore_index}",
                int(outside[0]),
            )


def check_gradient(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> None:
    """What the op of the gradient demands beyond that."""
    require(grad.numel() == 1, "grad", "one element", tuple(grad.shape))
    samples, tokens = logits.shape[:2]
    shapes = (
        ("labels", labels, (samples, tokens)),
        ("weights", weights, (samples,)),
        ("log_sums", log_sums, (2, samples, tokens)),
    )
    for name, tensor, shape in shapes:
        require(tensor.shape == shape, name, f"shape {shape}", tuple(tensor.shape))


SCHEMA = (
    "(Tensor logits, Tensor labels, float temperature, float floor, "
    "int ignore_index) -> (Tensor loss, Tensor losses, Tensor weights, Tensor log_normaliser, "
    "Tensor log_sums)"
)


GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor logits, Tensor labels, Tensor weights, Tensor log_sums, "
    "int ignore_index) -> Tensor"
)


def fake(
    logits: Tensor, labels: Tensor, temperature: float, floor: float, ignore_index: int
) -> tuple[Tensor, ...]:
    """Empty outputs, for torch.compile."""
    log_sums = logits.new_empty((2, *logits.shape[:2]), dtype=accumulate_dtype(logits.dtype))
    return *sample_outputs(logits), log_sums


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Only the loss has a gradient; the weights are constants."""
    logits, labels, _, _, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for outputs without a gradient, at every call
    ctx.save_for_backward(logits, labels, output[2], output[4])


def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    """The gradient of the first argument."""
    if grad is None:
        return (None,) * 5
    kernel = gradient_kernel("adaptive_cross_entropy_backward", differentiable_gradient)
    found = kernel(grad, *ctx.saved_tensors, ctx.ignore_index)
    return found, None, None, None, None


registry.define(
    "adaptive_cross_entropy", SCHEMA, formula, check, fake=fake, backward=(setup_context, backward)
)
registry.define(
    "adaptive_cross_entropy_backward",
    GRADIENT_SCHEMA,
    gradient,
    check_gradient,
    fake=like_second,
)


def differentiable(logits: Tensor, labels: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    """Checked; of its outputs only the loss has a gradient."""
    check(logits, labels, *numbers)
    return constant_weights(_cross_entropy(logits, labels, *numbers))


def differentiable_gradient(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> Tensor:
    """The gradient, itself a function of ``grad`` and ``logits``."""
    losses = _cross_entropy(logits, labels, 0.0, 1.0, ignore_index)[1]
    return gradient_of((weights * losses).sum(), logits, grad)


def _cross_entropy(logits: Tensor, labels: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    counted = (labels != numbers[-1]).unsqueeze(2)
    label = torch.where(counted, labels.unsqueeze(2), 0)
    # torch multiplies by 0 where the formula selects, and 0 times an ignored inf is NaN
    values = wide(logits).where(counted, 0.0)
    # a loss is a function of the others less the label's logit: then the label's gradient is -(sum
    # of the others'), which keeps its digits where softmax - 1 loses them
    picked = values.gather(2, label)
    moved = torch.where(picked.isfinite(), picked - picked.detach(), 0.0)  # of value 0
    values = (values - moved).scatter(2, label, picked.detach())
    return formula(values, labels, *numbers)
