"""Cross-entropies that leave their gradient where the logits were, as autograd functions.

The memory of the logits is handed on as their gradient. So that this cannot go wrong unnoticed,
every write bumps the version of the logits: whoever else saved them for a backward pass raises
there, and so does a second backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import adaptive_cross_entropy, registry
from .arguments import FLOAT32_MAX, floats, in_place
from .dtypes import wide
from .rows import in_place_kernel, sample_outputs, torch_looks_inside

_bump = torch.autograd.graph.increment_version


def gradient_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> None:
    """As above, written over the logits."""
    logits.copy_(
        adaptive_cross_entropy.gradient(grad, logits, labels, weights, log_sums, ignore_index)
    )


def sum_(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    floor: float,
    ignore_index: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token a sample: total = scale * sum_i raw_i l_i with raw_i = max(l_i, floor)^-lambda ->
    total, losses, weights, normaliser = sum_i raw_i. Writes d total / d logits over the logits, the
    raw_i constant.
    """
    outputs = adaptive_cross_entropy.formula(logits, labels, temperature, floor, ignore_index)
    loss, losses, weights, log_normaliser, log_sums = outputs
    raw = losses.to(torch.float64).clamp_min(floor).pow(-temperature).to(losses.dtype)
    raw = torch.where(labels[:, 0] != ignore_index, raw, 0.0)
    factor = torch.full_like(loss, scale)
    gradient_(factor, logits, labels, raw, log_sums, ignore_index)
    return (raw * losses).sum() * factor, losses, weights, log_normaliser.exp().to(losses.dtype)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, rounded once."""
    gradient.copy_(wide(gradient) * factor)


def check_gradient_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> None:
    """As of ``adaptive_cross_entropy_backward``; and the logits are written to."""
    adaptive_cross_entropy.check_gradient(grad, logits, labels, weights, log_sums, ignore_index)
    in_place("logits", logits)


def check_sum_(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    floor: float,
    ignore_index: int,
    scale: float,
) -> None:
    """What the op of the sum demands of its arguments."""
    adaptive_cross_entropy.check(logits, labels, temperature, floor, ignore_index)
    in_place("logits", logits)
    one = "one token per sample, [samples, 1, classes]"
    require(logits.shape[1] == 1, "logits", one, tuple(logits.shape))
    number("scale", scale, -FLOAT32_MAX, FLOAT32_MAX)


def check_scale_(gradient: Tensor, factor: Tensor) -> None:
    """What the op of the factor demands of its arguments."""
    floats("gradient", [gradient])
    require(factor.numel() == 1, "factor", "one element", tuple(factor.shape))
    in_place("gradient", gradient)


GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor(a!) logits, Tensor labels, Tensor weights, Tensor log_sums, "
    "int ignore_index) -> ()"
)


SUM_SCHEMA = (
    "(Tensor(a!) logits, Tensor labels, float temperature, float floor, int ignore_index, "
    "float scale) -> (Tensor total, Tensor losses, Tensor weights, Tensor normaliser)"
)


SCALE_SCHEMA = "(Tensor(a!) gradient, Tensor factor) -> ()"


def fake_sum(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Empty outputs, for torch.compile."""
    total, losses, weights, _ = sample_outputs(logits)
    return total, losses, weights, torch.empty_like(total)


registry.define("adaptive_cross_entropy_backward_", GRADIENT_SCHEMA, gradient_, check_gradient_)
registry.define("adaptive_cross_entropy_sum_", SUM_SCHEMA, sum_, check_sum_, fake=fake_sum)
registry.define("adaptive_cross_entropy_scale_", SCALE_SCHEMA, scale_, check_scale_)


def wanted(logits: Tensor) -> bool:
    """True if there will be a gradient to write, and nothing else wants the logits.

    A compiler plans memory itself, and its writes bump no version; torch.func and forward mode
    differentiate by their own rules.
    """
    plain = not torch.compiler.is_compiling() and not torch_looks_inside()
    return torch.is_grad_enabled() and logits.requires_grad and plain


def check_logits(logits: Tensor) -> None:
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


def _refuse_graph() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: expected False, found True; a gradient written over the logits is not "
            "differentiable: use adaptive_cross_entropy(inplace=False)"
        )


class CrossEntropy(torch.autograd.Function):
    """The op on [samples, tokens, classes] with its own outputs and context; the backward pass
    writes over the logits.
    """

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
        """The op's outputs; the logits are read."""
        return in_place_kernel("adaptive_cross_entropy", logits.dtype)(logits, labels, *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """As the op's; without a gradient of the loss nothing is written."""
        adaptive_cross_entropy.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        """The logits, which become the gradient."""
        _refuse_graph()
        if grad is None:
            return (None,) * 5
        logits, *others = ctx.saved_tensors
        in_place_kernel("adaptive_cross_entropy_backward_", logits.dtype)(
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
        total, _, _, normaliser = in_place_kernel("adaptive_cross_entropy_sum_", logits.dtype)(
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
        in_place_kernel("adaptive_cross_entropy_scale_", gradient.dtype)(gradient, grad)
        _bump(gradient)  # also by 1: it is handed on, and whoever gets it may write it
        return gradient.detach(), None, None, None, None, None
