"""Divergence of a head's distributions from those of a teacher's head, without all the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import number, require
from . import linear_arguments, registry
from .dtypes import accumulate_dtype
from .layout import in_memory
from .linear_arguments import prepared
from .linear_kl_tiles import forward, gradient
from .linear_tiles import Head
from .rows import gradient_kernel, kernel


def formula(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    label_shift: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """All logits at once -> KL(softmax(teacher - label_shift onehot) || softmax(logits)) [rows], 0
    where ignored: the truth.
    """
    counted = (labels != ignore_index).unsqueeze(1)
    label = torch.where(counted, labels.unsqueeze(1), 0)
    numbers = softcap, logit_scale
    logits, teacher = (
        Head(w, b, *numbers).logits(torch.where(counted, h, 0.0))
        for h, w, b in (
            (hidden, weight, bias),
            (teacher_hidden, teacher_weight, teacher_bias),
        )
    )
    teacher = teacher.scatter_add(1, label, torch.full_like(teacher[:, :1], -label_shift))
    log_q, log_p = logits.log_softmax(1), teacher.log_softmax(1)
    p = log_p.exp()
    some = p != 0
    # selected before: 0 times inf is NaN, in a gradient too
    terms = p.where(some, 0.0) * (log_p.where(some, 0.0) - log_q.where(some, 0.0))
    return (torch.where(counted.squeeze(1), terms.sum(1), 0.0),)


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor,
    label_shift: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> None:
    """What the op demands of its arguments; raises ValueError."""
    linear_arguments.check(hidden, weight, labels, bias, softcap, logit_scale, ignore_index)
    linear_arguments.check_head("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    wanted = hidden.shape[0], hidden.dtype, hidden.device
    found = teacher_hidden.shape[0], teacher_hidden.dtype, teacher_hidden.device
    require(
        found == wanted,
        "teacher_hidden",
        f"{wanted[0]} rows, {wanted[1]} on {wanted[2]}",
        f"{found[0]} rows, {found[1]} on {found[2]}",
    )
    classes = weight.shape[0]
    require(
        teacher_weight.shape[0] == classes,
        "teacher_weight",
        f"{classes} classes",
        teacher_weight.shape[0],
    )
    number("label_shift", label_shift, -torch.inf)


SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
    "Tensor? teacher_bias, Tensor labels, float label_shift, float? softcap, float logit_scale, "
    "int ignore_index) -> (Tensor kl, Tensor log_sums)"
)


GRADIENT_SCHEMA = (
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor labels, Tensor log_sums, "
    "float label_shift, float? softcap, float logit_scale, int ignore_index, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)"
)


def fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Empty outputs, for torch.compile."""
    kl = hidden.new_empty(hidden.shape[:1], dtype=accumulate_dtype(hidden.dtype))
    return kl, kl.new_empty((4, *kl.shape))


def fake_gradient(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients, for torch.compile."""
    return linear_arguments.empty_gradients(hidden, weight, bias, rest[-1])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The teacher is a constant."""
    *tensors, label_shift, softcap, logit_scale, ignore_index = inputs
    ctx.numbers = label_shift, softcap, logit_scale, ignore_index
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    """The student's gradients that are needed, and no others."""
    needed = list(ctx.needs_input_grad[:3])
    derive = gradient_kernel("linear_soft_target_kl_backward", differentiable_gradient)
    found = derive(grad, *ctx.saved_tensors, *ctx.numbers, needed)
    some = (t if need else None for t, need in zip(found, needed, strict=True))
    return *some, *(None,) * 8


def differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    """Checked; what torch differentiates by itself."""
    check(*arguments)
    return formula(*arguments)


def differentiable_gradient(grad: Tensor, *rest: Any) -> list[Tensor | None]:
    """The gradients, themselves functions of all that has one."""
    tensors, numbers, needed = rest[:7], rest[8:-1], rest[-1]  # and the log_sums between them
    outputs = formula(*tensors, *numbers)
    return linear_arguments.derived(outputs, tensors[:3], (grad,), needed)


def check_gradient(*rest: Any) -> None:
    """What the forward op has seen is as it was."""


registry.compose(
    "linear_soft_target_kl", SCHEMA, forward, check, fake=fake, backward=(setup_context, backward)
)
registry.compose(
    "linear_soft_target_kl_backward", GRADIENT_SCHEMA, gradient, check_gradient, fake=fake_gradient
)


def linear_soft_target_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    labels: Tensor | None = None,
    label_shift: float = 0.0,
    row_weights: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """sum_i w_i KL(softmax(teacher_i) || softmax(logits_i)) [] of two heads, whose logits are never
    all in memory.

    KL to a reference model on the retain set; with ``label_shift`` UNDIAL (Dong et al. 2024), whose
    teacher is the model itself with the label's logit lowered (their loss is this one plus the
    teacher's entropy, which has no gradient). A ``class_bias`` as ``soft_target_kl`` takes it is
    part of ``teacher_bias`` (divided by the logit_scale; not under a softcap), -inf too. Weights of
    classes it does not take: that needs all logits, and ``soft_target_kl``.

    Args:
        hidden, weight, bias, softcap, logit_scale, ignore_index: as ``linear_logp``; scale and cap
            are the teacher's, too.
        teacher_hidden: [rows, its features], of the same dtype; teacher_weight: [classes, its
            features]; teacher_bias: [classes]. Constants.
        labels: int64 [rows]; rows whose label is ignored have no part. None: all rows have one.
        label_shift: is subtracted from the teacher's logit at the label.
        row_weights: [rows], detached, any sign; None = 1 / the number of rows that have a part.
            Rows of weight 0 have none.

    Memory: two tiles of logits, else as ``linear_logp``. Six products of matrices, as the backward
    pass makes both tiles again; from all logits it would be four. The Fisher of samples takes the
    head's gradients of samples by ``torch.func.vmap``, from all logits, and says so.

    Raises:
        ValueError: as ``linear_logp``; a teacher that requires grad; a label_shift without labels.
    """
    if has_torch_function((hidden, weight)):  # a mode that looks on, as the Fisher of samples does
        return handle_torch_function(
            linear_soft_target_kl,
            (hidden, weight),
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            labels=labels,
            label_shift=label_shift,
            row_weights=row_weights,
            bias=bias,
            teacher_bias=teacher_bias,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
        )
    require(
        not teacher_hidden.requires_grad and not teacher_weight.requires_grad,
        "teacher_hidden and teacher_weight",
        "constants",
        "requires_grad=True",
        "run the teacher under torch.no_grad(), detach its head",
    )
    require(
        label_shift == 0.0 or labels is not None, "labels", "a tensor beside label_shift", labels
    )
    rows = hidden.shape[:1]
    if labels is None:
        labels = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    wide = accumulate_dtype(hidden.dtype)
    if row_weights is None:
        counted = labels != ignore_index
        row_weights = counted.to(wide) / counted.sum().clamp_min(1)
    else:
        require(
            row_weights.shape == rows,
            "row_weights",
            f"shape {tuple(rows)}",
            tuple(row_weights.shape),
        )
        row_weights = row_weights.detach().to(wide)
        labels = torch.where(row_weights != 0, labels, ignore_index)
    hidden, weight, bias = prepared(hidden, weight, bias)
    teacher_hidden, teacher_weight, teacher_bias = prepared(
        teacher_hidden, teacher_weight, teacher_bias, teacher="teacher_"
    )
    op = kernel("linear_soft_target_kl", differentiable, hidden)
    tensors = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels)
    kl = op(
        *(None if t is None else in_memory(t) for t in tensors),
        float(label_shift),
        None if softcap is None else float(softcap),
        float(logit_scale),
        ignore_index,
    )[0]
    return (row_weights * kl).sum()
