"""Divergence from soft targets: teachers of BT and SCRUB (Hinton et al. 2015)."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import registry
from .adaptive_weights import readable
from .arguments import aligned, floats
from .dtypes import accumulate_dtype, wide
from .layout import in_memory
from .rows import gradient_kernel, gradient_of, kernel, like_second, row_shift, sample_outputs


def formula(
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    class_bias: Tensor | None,
    class_weights: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i w_i l_i, l_i = T^2 sum_v k_v p_v log(p_v / q_v) -> loss, losses, log_sums; p =
    softmax(teacher_i / T + class_bias), q = softmax(logits_i / T).

    logits, teacher_logits [samples, classes]; weights [samples] of any sign, None = 1 / samples;
    class_bias [classes], None = 0; class_weights k [classes] >= 0, None = 1. losses [samples] and
    log_sums [4, samples] are 0 where the weight is; the latter are the logits' maximum (0 where
    that is infinite) and log sum e^((x - maximum) / T), then those of teacher + T class_bias; with
    class_weights there is a fifth, sum_v k_v p_v. All in fp32 (fp64 for fp64). A class without
    probability for the teacher, or without weight, adds nothing, whatever its logit.
    """
    weights = _row_weights(weights, logits)
    counted = (weights != 0).unsqueeze(1)
    biased = _biased(teacher_logits, class_bias, temperature)
    pair = [torch.where(counted, x, 0.0) for x in (wide(logits), biased)]
    shifts = [row_shift(x) for x in pair]
    relative = [(x - s.unsqueeze(1)) / temperature for x, s in zip(pair, shifts, strict=True)]
    sums = [torch.where(counted.squeeze(1), x.exp().sum(dim=1).log(), 0.0) for x in relative]
    log_q, log_p = (x - s.unsqueeze(1) for x, s in zip(relative, sums, strict=True))
    p = log_p.exp()
    log_sums = [shifts[0], sums[0], shifts[1], sums[1]]
    if class_weights is not None:
        p = p * class_weights
        log_sums.append(torch.where(counted, p, 0.0).sum(dim=1))
    losses = torch.where(counted & (p != 0), p * (log_p - log_q), 0.0).sum(dim=1) * temperature**2
    return (weights * losses).sum(), losses, torch.stack(log_sums)


def gradient(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    class_bias: Tensor | None,
    class_weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> Tensor:
    """d loss / d logits_v = grad * w_i * T * (q_v sum_u k_u p_u - k_v p_v); 0 where the weight
    is 0. Without class_weights the sum is 1.
    """
    weights = _row_weights(weights, logits)
    row = (weights * temperature * grad).unsqueeze(1)
    biased = _biased(teacher_logits, class_bias, temperature)
    q, p = (
        ((x - shift.unsqueeze(1)) / temperature - log_sum.unsqueeze(1)).exp()
        for x, shift, log_sum in ((wide(logits), *log_sums[:2]), (biased, *log_sums[2:4]))
    )
    if class_weights is not None:
        q, p = q * log_sums[4].unsqueeze(1), p * class_weights
    return torch.where(weights.unsqueeze(1) != 0, (q - p) * row, 0.0).to(logits.dtype)


def _biased(teacher_logits: Tensor, class_bias: Tensor | None, temperature: float) -> Tensor:
    """What the teacher's softmax over T is taken of."""
    teacher = wide(teacher_logits)
    return teacher if class_bias is None else teacher + class_bias * temperature


def _row_weights(weights: Tensor | None, logits: Tensor) -> Tensor:
    """[samples]"""
    if weights is not None:
        return weights
    samples = logits.shape[0]
    return logits.new_full((samples,), 1.0 / max(samples, 1), dtype=accumulate_dtype(logits.dtype))


def check(
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    class_bias: Tensor | None,
    class_weights: Tensor | None,
    temperature: float,
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
    samples, classes = logits.shape
    _check_constant("weights", weights, samples, logits)
    _check_constant("class_bias", class_bias, classes, logits)
    _check_constant("class_weights", class_weights, classes, logits)
    if class_bias is not None and readable(class_bias):
        allowed = class_bias < math.inf
        require(bool(allowed.all()), "class_bias", "numbers below inf", _first(class_bias, allowed))
        possible = bool((class_bias > -math.inf).any())
        require(possible, "class_bias", "a class that is not forbidden", "only -inf")
    if class_weights is not None and readable(class_weights):
        allowed = (class_weights >= 0) & (class_weights < math.inf)
        found = _first(class_weights, allowed)
        require(bool(allowed.all()), "class_weights", "finite numbers >= 0", found)
    number("temperature", temperature, 0.0, open_low=True)


def _check_constant(name: str, constant: Tensor | None, size: int, logits: Tensor) -> None:
    """A number for each row or class, in the type the logits are computed in."""
    if constant is None:
        return
    wanted = accumulate_dtype(logits.dtype)
    require(constant.shape == (size,), name, f"shape {(size,)}", tuple(constant.shape))
    require(constant.dtype == wanted, name, f"dtype {wanted}", constant.dtype)
    require(constant.device == logits.device, name, f"device {logits.device}", constant.device)


def _first(values: Tensor, allowed: Tensor) -> float | None:
    """The first that is not allowed."""
    refused = values[~allowed]
    return refused[0].item() if refused.numel() else None


def check_gradient(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    class_bias: Tensor | None,
    class_weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> None:
    """What the op of the gradient demands beyond that."""
    require(grad.numel() == 1, "grad", "one element", tuple(grad.shape))
    shape = (_log_sums(class_weights), logits.shape[0])
    require(log_sums.shape == shape, "log_sums", f"shape {shape}", tuple(log_sums.shape))


def _log_sums(class_weights: Tensor | None) -> int:
    """How many numbers of a row the gradient needs again."""
    return 4 if class_weights is None else 5


SCHEMA = (
    "(Tensor logits, Tensor teacher_logits, Tensor? weights, Tensor? class_bias, "
    "Tensor? class_weights, float temperature) -> (Tensor loss, Tensor losses, Tensor log_sums)"
)


GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor logits, Tensor teacher_logits, Tensor? weights, Tensor? class_bias, "
    "Tensor? class_weights, Tensor log_sums, float temperature) -> Tensor"
)


def fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Empty outputs, for torch.compile."""
    loss, losses, *_ = sample_outputs(logits)
    return loss, losses, losses.new_empty((_log_sums(rest[3]), logits.shape[0]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Only the loss has a gradient; the weights are constants."""
    *tensors, ctx.temperature = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for outputs without a gradient, at every call
    ctx.save_for_backward(*tensors, output[2])


def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    """The gradient of the first argument."""
    if grad is None:
        return (None,) * 6
    derive = gradient_kernel("soft_target_kl_backward", differentiable_gradient)
    found = derive(grad, *ctx.saved_tensors, ctx.temperature)
    return found, None, None, None, None, None


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


def differentiable_gradient(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    """The gradient, itself a function of ``grad`` and ``logits``."""
    constants = (*rest[:-2], rest[-1])  # without the log_sums
    return gradient_of(formula(logits, *constants)[0], logits, grad)


def _constant(name: str, tensor: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    require(isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__)
    require(tensor.device == device, name, f"device {device}", tensor.device)
    return tensor.detach().to(dtype).contiguous()


def soft_target_kl(
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    *,
    class_bias: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """sum_i w_i T^2 KL(softmax(teacher_i / T) || softmax(logits_i / T)) [], forward and backward
    fused.

    What students of a teacher minimise (Hinton et al. 2015): the bad teacher of BT, and SCRUB,
    which ascends it too. With ``class_bias`` the teacher is p_i = softmax(teacher_i / T +
    class_bias), as TRW tilts it (arXiv 2506.20893); with ``class_weights`` k a row's loss is
    T^2 sum_v k_v p_v log(p_v / q_v), as SIU masks the vocabulary (arXiv 2405.12523), whose gradient
    is w_i T (q_v sum_u k_u p_u - k_v p_v). Where the k differ it is no divergence and may be
    negative.

    Args:
        logits: [samples, classes]; fp32, bf16, fp16 or fp64; the arithmetic is at least fp32.
        teacher_logits: of the same shape and dtype; must not require grad. -inf forbids a class,
            which then adds nothing; where only ``logits`` forbid it the loss is inf.
        weights: [samples], detached, any sign (negative = ascent); None = 1 / samples each. Rows of
            weight 0 have no part in anything, whatever their logits.
        temperature: T > 0. T^2 keeps the gradient's size independent of it.
        class_bias: [classes], detached; -inf forbids a class to the teacher; None = 0.
        class_weights: [classes], detached, finite, >= 0; a class of weight 0 adds nothing, whatever
            its logit, and stays in the softmax of both; None = 1.

    Raises:
        ValueError, RuntimeError: wrong shape, dtype, device or range. The values of class_bias and
            class_weights are looked at on a CPU; elsewhere the host would wait for them.
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
    at = accumulate_dtype(logits.dtype), logits.device
    if weights is not None:
        weights = _constant("weights", weights, *at)
    if class_bias is not None:
        class_bias = _constant("class_bias", class_bias, *at)
    if class_weights is not None:
        class_weights = _constant("class_weights", class_weights, *at)
    op = kernel("soft_target_kl", differentiable, logits)
    return op(
        in_memory(logits),
        in_memory(teacher_logits),
        weights,
        class_bias,
        class_weights,
        float(temperature),
    )[0]
