"""Adaptive cross-entropies of samples from hidden states (docs/equations.md, 4 and 5).

One pass where the logits of whole samples fit a workspace: their gradient is taken while they are
there, three products of matrices. Else ``linear_logp`` first, whose backward pass makes the logits
again: four.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..errors import integer, number, require
from . import rows
from .adaptive_weights import LOSS_FLOOR
from .layout import in_memory
from .linear_arguments import check, prepared
from .linear_logp import linear_logp
from .linear_one_pass import (
    LinearLoss,
    Rule,
    Samples,
    Weigh,
    chunk_rows,
    divided,
    one_pass,
    samples_of,
    weighed,
)
from .linear_tiles import Head, spread, taken

# bytes of a chunk's logits and of the sums over chunks; on a GPU 4,096 rows of 128k classes
WORKSPACE = {"cpu": 1 << 28, "cuda": 1 << 31}


def several_passes(
    logp: Tensor,
    labels: Tensor,
    sample_index: Tensor | None,
    ignore_index: int,
    weigh: Rule,
    normalise: bool,
) -> LinearLoss:
    """From all rows' log-probabilities, which torch differentiates."""
    counted, losses = labels != ignore_index, -logp
    tokens = counted.long()
    if sample_index is not None:
        count = int(sample_index.max()) + 1 if labels.numel() else 0
        losses = losses.new_zeros(count).index_add(0, sample_index, losses)
        tokens = tokens.new_zeros(count).index_add(0, sample_index, tokens)
        losses = losses / tokens.clamp_min(1)
    known = losses.detach()
    raw, shares = weighed(weigh, known, tokens, slice(0, known.shape[0]))
    normaliser = shares.sum()
    weights = (divided(raw, normaliser) if normalise else raw).to(known.dtype)
    return LinearLoss((weights * losses).sum(), known, weights, normaliser.to(known.dtype))


class OnePass(torch.autograd.Function):
    """``one_pass``; the backward pass hands its gradients on."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        samples: Samples,
        numbers: tuple[float | None, float],
        room: int,
        weigh: Rule,
        normalise: bool,
    ) -> tuple[Tensor, ...]:
        """The loss, and the gradients kept."""
        ctx.set_materialize_grads(False)
        total, needed = hidden.shape[0], list(ctx.needs_input_grad[:3])
        hidden, labels = taken(samples.rows, hidden, labels)
        head = Head(weight, bias, *numbers)
        result, found = one_pass(hidden, labels, head, samples, room, weigh, normalise, needed)
        to_hidden = found.hidden
        if to_hidden is not None:
            found = found._replace(hidden=spread(samples.rows, to_hidden, total))
        ctx.save_for_backward(*(None if t is None else t.to(weight.dtype) for t in found))
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        """What the forward pass left, times ``grad``."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: expected False, found True; gradients of the forward pass are not "
                "differentiable: use workspace=0"
            )
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None:
            return None, None, None, *nothing
        found = ctx.saved_tensors
        for gradient in found:
            if gradient is not None:
                scale = rows.in_place_kernel("adaptive_cross_entropy_scale_", gradient.dtype)
                scale(gradient, grad)
                # handed on, whoever gets it may write it: a second backward pass raises
                torch.autograd.graph.increment_version(gradient)
        hidden, weight, bias = (None if t is None else t.detach() for t in found)
        return hidden, weight, bias, *nothing


def linear_adaptive_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 0.5,
    *,
    sample_index: Tensor | None = None,
    floor: float = LOSS_FLOOR,
    weigh: Weigh | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    normalise: bool = True,
    workspace: int | None = None,
) -> LinearLoss:
    """sum_i w_i l_i of per-sample cross-entropies, ``adaptive_cross_entropy`` from hidden states,
    whose logits are never all in memory.

    A sample's loss l_i is the mean over its labelled rows, its raw weight r_i = max(l_i,
    floor)^-temperature, w_i = r_i / sum_j r_j; weights are constants.

    Args:
        hidden, weight, labels, bias, softcap, logit_scale, ignore_index: as ``linear_logp``.
        sample_index: int64 [rows], each row's sample, from 0, in any order: of B sequences of T
            tokens ``torch.arange(B).repeat_interleave(T)``. None: each row is a sample.
        weigh: another rule, ``weigh(losses, samples)``: from losses [k], detached, of a slice of
            the samples to raw weights [k] of any sign. It sees a chunk at a time, so a weight may
            depend on its own sample alone; what else it needs (reference losses, lengths) it takes
            from tensors [samples] by the slice. A rule may return two tensors [k], the second for
            the normaliser to add up: ``with_ceiling(raw, losses, 1.0, reference), raw``.
        normalise: False leaves the division to the optimizer: loss = sum_i r_i l_i, weights = r_i.
            ``loss.backward(); opt.grad_scale = normaliser``: of several batches the sum of their
            normalisers; of ranks whose gradients are averaged (DDP, FSDP2) the mean.
        workspace: bytes for the logits of a chunk of whole samples and, with bf16 weights and
            several chunks, the sums of d / d weight in fp32; None = 256 MiB on the CPU, 2 GiB on a
            GPU. If the longest sample fits, the gradients are taken in the forward pass (three
            products of matrices) and kept until the backward pass, which has no second derivative
            and happens once. Else, and with 0, compiled, in a Fisher, in fp64 or fp16:
            ``linear_logp`` and its backward pass (four).

    Returns:
        loss, losses, weights, normaliser; fp32 (fp64 for fp64).

    Raises:
        ValueError: as ``linear_logp``; a sample_index that is none; a rule that returns another
            shape.
    """
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    if sample_index is not None:
        _check_index(sample_index, labels)
    if workspace is not None:
        integer("workspace", workspace, 0)
    hidden, weight, bias = prepared(hidden, weight, bias)
    rule = _power(float(temperature), float(floor)) if weigh is None else _checked(weigh)
    numbers = None if softcap is None else float(softcap), float(logit_scale)
    # fp32 sums over chunks hold raw weights
    narrow_range = weigh is None and temperature * max(-math.log10(floor), 2.0) > 30
    if not narrow_range and _at_once(hidden, weight, bias):
        hidden, weight, labels = (in_memory(t) for t in (hidden, weight, labels))
        bias = None if bias is None else in_memory(bias)
        check(hidden, weight, labels, bias, *numbers, ignore_index)
        samples = samples_of(labels, sample_index, ignore_index)
        longest = int(samples.tokens.max()) if labels.numel() else 0
        kind = "cpu" if hidden.device.type == "cpu" else "cuda"
        limit = WORKSPACE[kind] if workspace is None else workspace
        room = chunk_rows(samples.sample.shape[0], weight, longest, limit)
        if room > 0:
            found = OnePass.apply(
                hidden, weight, bias, labels, samples, numbers, room, rule, normalise
            )
            return LinearLoss(*found)
    logp, _ = linear_logp(
        hidden,
        weight,
        labels,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
    )
    return several_passes(logp, labels, sample_index, ignore_index, rule, normalise)


def _at_once(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether there will be a gradient, which nobody derives again."""
    wanted = (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    plain = not torch.compiler.is_compiling() and not rows.torch_looks_inside()
    served = hidden.dtype in (torch.float32, torch.bfloat16)
    return torch.is_grad_enabled() and wanted and plain and served and not _watched()


def _watched() -> bool:
    """By a mode, as that of the Fisher of samples, which knows linear_logp and derives its gradient
    again; a default device is a mode, too, but looks at nothing.
    """
    modes = _get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def _power(temperature: float, floor: float) -> Rule:
    """max(l, floor)^-temperature, in fp64."""

    def rule(losses: Tensor, samples: slice) -> tuple[Tensor, Tensor]:
        raw = losses.double().clamp_min(floor).pow(-temperature)
        return raw, raw

    return rule


def _checked(weigh: Weigh) -> Rule:
    def rule(losses: Tensor, samples: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = weigh(losses, samples)
        both = found if isinstance(found, tuple) and len(found) == 2 else (found, found)
        for tensor in both:
            shape = tuple(losses.shape)
            right = isinstance(tensor, Tensor) and tensor.shape == losses.shape
            wrong = getattr(tensor, "shape", tensor)
            require(right, "weigh", f"a tensor of shape {shape}, or two", wrong)
        raw, shares = (t.double() for t in both)
        return raw, shares

    return rule


def _check_index(sample_index: Tensor, labels: Tensor) -> None:
    wanted = f"int64 of shape {tuple(labels.shape)}"
    right = sample_index.dtype == torch.int64 and sample_index.shape == labels.shape
    found = f"{sample_index.dtype} of shape {tuple(sample_index.shape)}"
    require(right, "sample_index", wanted, found)
    require(
        sample_index.device == labels.device,
        "sample_index",
        f"device {labels.device}",
        sample_index.device,
    )
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        least = int(sample_index.min())
        require(least >= 0, "sample_index", "samples from 0", least)
