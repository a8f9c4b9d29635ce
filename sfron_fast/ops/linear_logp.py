"""Log-probabilities of labels under a language model's head, without all its logits in memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import registry
from .dtypes import accumulate_dtype
from .linear_arguments import check, derived, empty_gradients, given
from .linear_tiles import (
    Head,
    LogSums,
    Tile,
    counted_rows,
    head_gradients,
    logit_tiles,
    multiplied,
    softmax_tiles,
    spread,
    taken,
)
from .rows import gradient_kernel, kernel, row_shift


def formula(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """All logits at once -> logp, lse [rows], which torch differentiates: the truth."""
    counted = labels != ignore_index
    label = torch.where(counted, labels, 0).unsqueeze(1)
    # selected before anything is computed of it: 0 times an ignored inf is NaN
    hidden = torch.where(counted.unsqueeze(1), hidden, 0.0)
    logits = Head(weight, bias, softcap, logit_scale).logits(hidden)
    shift = row_shift(logits)
    picked = logits.gather(1, label)
    # a function of the others less the label's logit: then the label's gradient is -(sum of the
    # others'), which keeps its digits where softmax - 1 loses them
    moved = torch.where(picked.isfinite(), picked - picked.detach(), 0.0)  # of value 0
    relative = (logits - moved).scatter(1, label, picked.detach()) - shift.unsqueeze(1)
    rest = relative.exp().scatter(1, label, 0.0).sum(dim=1)
    at_label = relative.gather(1, label).squeeze(1)
    log_sum = torch.log1p(rest + torch.expm1(at_label))
    logp, lse = at_label - log_sum, shift + log_sum + moved.squeeze(1)
    return torch.where(counted, logp, 0.0), torch.where(counted, lse, 0.0)


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse [rows] and log_sums [2, rows]: shift and log sum e^(x - shift), apart as their sum
    would lose digits. All 0 where the label is ignored.
    """
    rows, head = counted_rows(labels, ignore_index), Head(weight, bias, softcap, logit_scale)
    hidden, counted = taken(rows, hidden, labels)
    sums = LogSums(counted, hidden)
    for tile in logit_tiles(multiplied(hidden), head):
        sums.add(tile)
    logp, shift, log_sum = [spread(rows, t, labels.shape[0]) for t in sums.result()]
    return logp, shift + log_sum, torch.stack([shift, log_sum])


def gradient(
    grad_logp: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    log_sums: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, weight and bias; empty where not needed.

    d logp / d x = onehot - p and d lse / d x = p. At the label 1 - p = -expm1(logp), which keeps
    the digits of a small loss.
    """
    rows, head = counted_rows(labels, ignore_index), Head(weight, bias, softcap, logit_scale)
    total = hidden.shape[0]
    hidden, grad_logp, grad_lse, labels, logp = taken(
        rows, multiplied(hidden), grad_logp, grad_lse, labels, logp
    )
    log_sums = torch.stack(taken(rows, *log_sums))
    tiles, size = gradient_tiles(grad_logp, grad_lse, hidden, labels, logp, log_sums, head)
    return head_gradients(tiles, hidden, head, size, needed).returned(rows, total, weight)


def gradient_tiles(
    grad_logp: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    labels: Tensor,
    logp: Tensor,
    log_sums: Tensor,
    head: Head,
) -> tuple[Iterator[Tile], Tensor]:
    """Of rows that all have a label: tiles of d / d logits, but for each row's size [rows] and the
    head's logit_scale.
    """
    size = torch.maximum(grad_logp.abs(), grad_lse.abs())
    size = torch.where(size == 0, 1.0, size)
    to_logp, to_lse = grad_logp / size, grad_lse / size
    label = to_lse * logp.exp() - to_logp * torch.expm1(logp)
    factor, dtype = to_lse - to_logp, hidden.dtype
    tiles = softmax_tiles(logit_tiles(hidden, head), head, labels, log_sums, factor, label, dtype)
    return tiles, size


SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float? softcap, "
    "float logit_scale, int ignore_index) -> (Tensor logp, Tensor lse, Tensor log_sums)"
)


GRADIENT_SCHEMA = (
    "(Tensor grad_logp, Tensor grad_lse, Tensor hidden, Tensor weight, Tensor labels, "
    "Tensor? bias, Tensor logp, Tensor log_sums, float? softcap, float logit_scale, "
    "int ignore_index, bool[] needed) -> (Tensor, Tensor, Tensor)"
)


def fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs, for torch.compile."""
    logp = hidden.new_empty(hidden.shape[:1], dtype=accumulate_dtype(hidden.dtype))
    return logp, torch.empty_like(logp), logp.new_empty((2, *logp.shape))


def fake_gradient(
    grad_logp: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients, for torch.compile."""
    return empty_gradients(hidden, weight, bias, rest[-1])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """logp and lse have a gradient."""
    hidden, weight, labels, bias, *ctx.numbers = inputs
    logp, _, log_sums = output
    ctx.mark_non_differentiable(log_sums)
    ctx.save_for_backward(hidden, weight, labels, bias, logp, log_sums)


def backward(
    ctx: Any, grad_logp: Tensor, grad_lse: Tensor, *unused: Any
) -> tuple[Tensor | None, ...]:
    """The gradients that are needed, and no others."""
    to = ctx.needs_input_grad
    needed = [to[0], to[1], to[3]]
    derive = gradient_kernel("linear_logp_backward", differentiable_gradient)
    found = derive(grad_logp, grad_lse, *ctx.saved_tensors, *ctx.numbers, needed)
    hidden, weight, bias = (t if need else None for t, need in zip(found, needed, strict=True))
    return hidden, weight, None, bias, None, None, None


def check_gradient(grad_logp: Tensor, grad_lse: Tensor, *rest: Any) -> None:
    """What the op of the gradient demands: what the forward op has seen is as it was."""


registry.compose(
    "linear_logp", SCHEMA, forward, check, fake=fake, backward=(setup_context, backward)
)
registry.compose(
    "linear_logp_backward", GRADIENT_SCHEMA, gradient, check_gradient, fake=fake_gradient
)


def differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Checked; what torch differentiates by itself."""
    check(*arguments)
    return formula(*arguments)


def differentiable_gradient(
    grad_logp: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    log_sums: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    needed: list[bool],
) -> list[Tensor | None]:
    """The gradients, themselves functions of all that has one."""
    outputs = formula(hidden, weight, labels, bias, softcap, logit_scale, ignore_index)
    return derived(outputs, (hidden, weight, bias), (grad_logp, grad_lse), needed)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[label] and log sum e^logits, both [rows] and differentiable, of logits =
    softcap * tanh(logit_scale * (hidden weight^T + bias) / softcap) that are never all in memory.

    The gradient is exact for any loss of logp and lse, whatever sign and size it has in a row:
    cross-entropies weighted by anything, z-losses (lse^2).

    Args:
        hidden: [rows, features], the last hidden states, flattened; fp32, bf16, fp16 or fp64. Rows
            whose label is ignored are left out of every product and may hold anything.
        weight: [classes, features] of the same dtype; frozen (no gradient) it costs a product less.
            A tied embedding gets both its gradients, by autograd.
        labels: int64 [rows], already shifted against the hidden states. One that is no class
            raises on the CPU and makes its row NaN on a GPU.
        bias: [classes], of the same dtype.
        softcap: Gemma's final_logit_softcapping.
        logit_scale: Cohere's; of Granite 1 / logits_scaling.
        ignore_index: rows with this label have logp and lse 0, and no gradient.

    Memory beside the gradients: a tile of logits (16 MiB on the CPU, 256 MiB on a GPU), sums of
    d / d hidden in fp32, and for bf16 and fp16 on the CPU hidden and a tile's weights in fp32, on a
    GPU a copy of a tile. All sums are fp32; an element of a gradient is rounded once. Under
    torch.autocast hidden, weight and bias are cast as a linear layer's would be. fp64, second
    derivatives and torch.func take all logits at once.

    Returns:
        logp, lse: fp32 (fp64 for fp64) [rows].

    Raises:
        ValueError: wrong shape, dtype, device or range, a DTensor, or (on the CPU) a label that is
            no class.
    """
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    if has_torch_function(tensors):  # a mode that looks on, as the Fisher of samples does
        named: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
        named["ignore_index"] = ignore_index
        return handle_torch_function(linear_logp, tensors, hidden, weight, labels, **named)
    arguments = given(hidden, weight, labels, bias, softcap, logit_scale, ignore_index)
    logp, lse, *_ = kernel("linear_logp", differentiable, arguments[0])(*arguments)
    return logp, lse
