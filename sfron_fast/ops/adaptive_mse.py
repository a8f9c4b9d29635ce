"""Squared errors of samples, weighted by themselves: docs/equations.md, 4 and 5."""

import math
from typing import Any

from torch import Tensor

from ..errors import number, require
from . import adaptive_weights, registry
from .adaptive_weights import LOSS_FLOOR, check_reference, nothing_of, portion
from .arguments import aligned, floats
from .dtypes import wide
from .layout import in_memory
from .rows import constant_weights, gradient_kernel, kernel, like_second, sample_outputs


def formula(
    prediction: Tensor,
    target: Tensor,
    reference: Tensor | None,
    temperature: float,
    floor: float,
    mean: bool,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prediction, target [samples, elements], reference [samples] or None -> loss, losses
    [samples], weights [samples], log_normaliser.
    """
    difference = wide(prediction) - wide(target)
    losses = (difference * difference).sum(dim=1)
    if mean:
        losses = losses / max(prediction.shape[1], 1)
    weights, log_normaliser = adaptive_weights.formula(
        losses, temperature, floor, None, reference, cap
    )
    return (weights * losses).sum(), losses, weights, log_normaliser


def gradient(
    grad: Tensor, prediction: Tensor, target: Tensor, weights: Tensor, mean: bool
) -> Tensor:
    """d loss / d prediction = grad * w_i * 2 (prediction - target) [/ elements]."""
    scale = 2.0 / max(prediction.shape[1], 1) if mean else 2.0
    difference = wide(prediction) - wide(target)
    return (difference * (weights * scale * grad).unsqueeze(1)).to(prediction.dtype)


def check(
    prediction: Tensor,
    target: Tensor,
    reference: Tensor | None,
    temperature: float,
    floor: float,
    mean: bool,
    cap: float,
) -> None:
    """What the op demands of its arguments; raises ValueError."""
    require(prediction.dim() == 2, "prediction", "[samples, elements]", tuple(prediction.shape))
    floats("prediction", [prediction])
    aligned("target", [target], [prediction])
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    check_reference(reference, len(prediction), prediction, floor, cap)


def check_gradient(
    grad: Tensor, prediction: Tensor, target: Tensor, weights: Tensor, mean: bool
) -> None:
    """What the op of the gradient demands beyond that."""
    require(grad.numel() == 1, "grad", "one element", tuple(grad.shape))


SCHEMA = (
    "(Tensor prediction, Tensor target, Tensor? reference, float temperature, float floor, "
    "bool mean, float cap) -> (Tensor loss, Tensor losses, Tensor weights, Tensor log_normaliser)"
)


GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor prediction, Tensor target, Tensor weights, bool mean) -> Tensor"
)


def fake(prediction: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Empty outputs, for torch.compile."""
    return sample_outputs(prediction)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Only the loss has a gradient; the weights are constants."""
    prediction, target, _, _, _, ctx.mean, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for outputs without a gradient, at every call
    ctx.save_for_backward(prediction, target, output[2])


def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    """The gradient of the first argument."""
    if grad is None:
        return (None,) * 7
    derive = gradient_kernel("adaptive_mse_backward", gradient)
    found = derive(grad, *ctx.saved_tensors, ctx.mean)
    return found, None, None, None, None, None, None


registry.define(
    "adaptive_mse", SCHEMA, formula, check, fake=fake, backward=(setup_context, backward)
)
registry.define(
    "adaptive_mse_backward", GRADIENT_SCHEMA, gradient, check_gradient, fake=like_second
)


def differentiable(prediction: Tensor, *constants: Any) -> tuple[Tensor, ...]:
    """Checked; of its outputs only the loss has a gradient."""
    check(prediction, *constants)
    return constant_weights(formula(prediction, *constants))


def adaptive_mse(
    prediction: Tensor,
    target: Tensor,
    temperature: float = 0.5,
    *,
    floor: float = LOSS_FLOOR,
    reduction: str = "mean",
    reference: Tensor | None = None,
    cap: float | None = None,
    group: Any = None,
) -> Tensor:
    """sum_i w_i l_i [] of per-sample squared errors (diffusion models), or, with a reference r,
    sum_i w_i l_i / r_i with the weights of l_i / r_i.

    Args:
        prediction, target: [samples, ...], equal shape and dtype; ``target`` must not require grad.
        reduction: "mean" or "sum" over a sample's elements.
        reference, cap: as ``adaptive_weights``; fp32 [samples] (fp64 for fp64), for example the
            retain set's loss at each sample's timestep, reduced alike.
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
        return nothing_of(prediction, group)
    loss, _, log_normaliser = adaptive_mse_parts(
        prediction,
        target,
        temperature,
        floor=floor,
        reduction=reduction,
        reference=reference,
        cap=cap,
    )
    return loss if group is None else loss * portion(log_normaliser, group).to(loss.dtype)


def adaptive_mse_parts(
    prediction: Tensor,
    target: Tensor,
    temperature: float,
    *,
    floor: float,
    reduction: str,
    reference: Tensor | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``adaptive_mse`` of samples that are there, returning (loss [], losses [samples], the
    normaliser's logarithm []); the losses are not relative to the reference.
    """
    known = reference is None or isinstance(reference, Tensor)
    require(known, "reference", "a tensor [samples], or None", type(reference).__name__)
    op = kernel("adaptive_mse", differentiable, prediction)
    rows, targets = in_memory(prediction.flatten(1)), in_memory(target.flatten(1))
    loss, losses, _, log_normaliser = op(
        rows,
        targets,
        None if reference is None else in_memory(reference.detach()),
        float(temperature),
        float(floor),
        reduction == "mean",
        math.inf if cap is None else float(cap),
    )
    return loss, losses, log_normaliser
