"""The losses in operations that torch differentiates: first derivatives come from the kernels, the
rest from here.

For fp64, which has no other kernels; for second derivatives of any dtype (``create_graph=True``);
and inside ``torch.func`` and forward mode, which look into every operation. The weights are
constants in all of them. Arguments and outputs are those of the op of the same name.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference, row_checks


def wanted() -> bool:
    """True where torch differentiates by rules of its own: inside ``torch.func``, and where dual
    numbers may occur.
    """
    return row_checks.transformed() or forward_ad._current_level >= 0


def adaptive_cross_entropy(logits: Tensor, labels: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    """Checked; of its outputs only the loss has a gradient."""
    row_checks.adaptive_cross_entropy(logits, labels, *numbers)
    return _constant_weights(_cross_entropy(logits, labels, *numbers))


def adaptive_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> Tensor:
    """The gradient, itself a function of ``grad`` and ``logits``."""
    losses = _cross_entropy(logits, labels, 0.0, 1.0, ignore_index)[1]
    return _gradient((weights * losses).sum(), logits, grad)


def adaptive_mse(prediction: Tensor, target: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    """Checked; of its outputs only the loss has a gradient."""
    row_checks.adaptive_mse(prediction, target, *numbers)
    return _constant_weights(reference.adaptive_mse(prediction, target, *numbers))


adaptive_mse_backward = reference.adaptive_mse_backward  # as it is


def soft_target_kl(logits: Tensor, *constants: Any) -> tuple[Tensor, ...]:
    """Checked; of its outputs only the loss has a gradient."""
    row_checks.soft_target_kl(logits, *constants)
    loss, *others = reference.soft_target_kl(logits, *constants)
    return loss, *(t.detach() for t in others)


def soft_target_kl_backward(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> Tensor:
    """The gradient, itself a function of ``grad`` and ``logits``."""
    return _gradient(
        reference.soft_target_kl(logits, teacher_logits, weights, temperature)[0], logits, grad
    )


def _cross_entropy(logits: Tensor, labels: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    counted = (labels != numbers[-1]).unsqueeze(2)
    label = torch.where(counted, labels.unsqueeze(2), 0)
    # torch multiplies by 0 where the formula selects, and 0 times an ignored inf is NaN
    wide = logits.to(reference.accumulate_dtype(logits.dtype)).where(counted, 0.0)
    # a loss is a function of the others less the label's logit: then the label's gradient is -(sum
    # of the others'), which keeps its digits where softmax - 1 loses them
    picked = wide.gather(2, label)
    moved = torch.where(picked.isfinite(), picked - picked.detach(), 0.0)  # of value 0
    wide = (wide - moved).scatter(2, label, picked.detach())
    return reference.adaptive_cross_entropy(wide, labels, *numbers)


def _constant_weights(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    _, losses, *others = outputs
    weights, *others = (t.detach() for t in others)
    return (weights * losses).sum(), losses.detach(), weights, *others


def _gradient(loss: Tensor, source: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(loss, source, grad.reshape(()), create_graph=True)[0]
