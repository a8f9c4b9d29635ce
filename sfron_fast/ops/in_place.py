"""Cross-entropies that leave their gradient where the logits were, as autograd functions.

The memory of the logits is handed on as their gradient. So that this cannot go wrong unnoticed,
every write bumps the
version of the logits: whoever else saved them for a backward pass raises there, and so does a
second backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import require
from . import differentiable
from . import registry as ops

_bump = torch.autograd.graph.increment_version


def wanted(logits: Tensor) -> bool:
    """True if there will be a gradient to write, and nothing else wants the logits.

    A compiler plans memory itself, and its writes bump no version; torch.func and forward mode
    differentiate by their own rules.
    """
    plain = not torch.compiler.is_compiling() and not differentiable.wanted()
    return torch.is_grad_enabled() and logits.requires_grad and plain


def check(logits: Tensor) -> None:
    """Raise unless the logits are contiguous and no leaf, nor a view of one: that would lose its
    values.
    """
    base = logits if logits._base is None else logits._base
    leaf = base.is_leaf and base.requires_grad
    require(
        not leaf,
        "logits",
        "the result of an operation",
        "a leaf that requires grad, or a view of one",
        "its values would be overwritten",
    )
    require(
        logits.is_contiguous(),
        "logits",
        "a contiguous tensor to write the gradient to",
        f"strides {logits.stride()}",
        "to skip tokens set their labels to ignore_index",
    )


def _served(name: str, dtype: torch.dtype) -> Any:
    """The op; for fp64 its checked reference."""
    return ops.default_kernel(name) if dtype == torch.float64 else getattr(ops, name)


def _refuse_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: expected False, found True; a gradient written over the logits is not "
            "differentiable: use adaptive_cross_entropy(inplace=False)"
        )


class CrossEntropy(torch.autograd.Function):
    """``adaptive_cross_entropy`` of [samples, tokens, classes] whose backward pass writes over the
    logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
        """The op's outputs but log_sums; the logits are read."""
        *outputs, log_sums = _served("adaptive_cross_entropy", logits.dtype)(
            logits, labels, *numbers
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(logits, labels, outputs[2], log_sums)
        ctx.ignore_index = numbers[2]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        """The logits, which become the gradient."""
        _refuse_graph()
        if grad is None:
            return (None,) * 5
        logits, *others = ctx.saved_tensors
        _served("adaptive_cross_entropy_backward_", logits.dtype)(
            grad, logits, *others, ctx.ignore_index
        )
        _bump(logits)
        return logits.detach(), None, None, None, None


class CrossEntropySum(torch.autograd.Function):
    """``adaptive_cross_entropy_sum_`` of [samples, 1, classes]: written by the forward pass, scaled
    if it has to be.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
        """Total and normaliser; the logits become the gradient of the total."""
        total, _, _, normaliser = _served("adaptive_cross_entropy_sum_", logits.dtype)(
            logits, labels, *numbers
        )
        _bump(logits)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normaliser)
        ctx.save_for_backward(logits)
        return total, normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        """What the forward pass left, times ``grad``."""
        _refuse_graph()
        if grad is None:
            return (None,) * 6
        (gradient,) = ctx.saved_tensors
        _served("adaptive_cross_entropy_scale_", gradient.dtype)(gradient, grad)
        _bump(gradient)  # also by 1: it is handed on, and whoever gets it may write it
        return gradient.detach(), None, None, None, None, None
