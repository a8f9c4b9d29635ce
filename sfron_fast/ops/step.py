"""What the ops ``sgd_step_`` and ``adamw_step_`` share: unscaling, clip, masks, slow weights."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import number
from .arguments import (
    aligned,
    correction_lists,
    floats,
    numbers_of,
    packed_masks,
    scalar_tensors,
)
from .bits import selected_bits
from .dtypes import accumulate_dtype, wide
from .interpolate import lerp
from .lists import spread, spread_masks
from .split_weights import join, split

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by (norm + 1e-6)


def grad_multiplier(
    norm: Tensor | None,
    grad_scale: Tensor | None,
    max_norm: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """[]: unscale and clip in one factor, min(1, max_norm / (norm + 1e-6)) / grad_scale."""
    factor = torch.ones((), dtype=dtype, device=device)
    if grad_scale is not None:
        factor = factor / grad_scale.reshape(()).to(device=device, dtype=dtype)
    if norm is not None:
        # beyond its range: inf
        limit = torch.full((), max_norm, dtype=torch.float64, device=device).to(dtype)
        factor = factor * (
            limit / (norm.reshape(()).to(device=device, dtype=dtype) + CLIP_EPS)
        ).clamp(max=1.0)
    return factor


def skip_step(norm: Tensor | None, found_inf: Tensor | None, skipped: Tensor | None) -> bool:
    """True, and counted in ``skipped``, if this step must not be applied: a non-finite norm, or an
    overflow found.
    """
    overflow = found_inf is not None and bool(found_inf != 0)
    skip = overflow or (norm is not None and not bool(torch.isfinite(norm)))
    if skipped is not None:
        skipped += skip
    return skip


def masked_grad(grad: Tensor, selected: Tensor | None, factor: Tensor, maximize: bool) -> Tensor:
    """The gradient as the update takes it: scaled, turned, and 0 where it is not selected."""
    g = wide(grad) * factor.to(accumulate_dtype(grad.dtype))
    if maximize:
        g = -g
    return g if selected is None else torch.where(selected, g, 0.0)


def store(target: Tensor, value: Tensor, frozen: Tensor | None) -> None:
    """Write ``value``; where ``frozen`` (a mask of selected weights) is given, only the selected
    elements.
    """
    value = value.to(target.dtype)
    target.copy_(value if frozen is None else torch.where(frozen, value, target))


class Weights:
    """Weights as they are computed with: one tensor each, or bf16 and a correction."""

    def __init__(
        self, tensors: Sequence[Tensor], corrections: Sequence[Tensor], like: Sequence[Tensor]
    ) -> None:
        self.tensors, self.corrections = spread(tensors, like), spread(corrections, like)

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def __getitem__(self, i: int) -> Tensor:
        param = self.tensors[i]
        return join(param, self.corrections[i]) if self.corrections else wide(param)

    def put(self, i: int, value: Tensor, step: int) -> None:
        """Store it; ``step`` decides how int8 corrections are rounded."""
        if self.corrections:
            value, correction = split(value, step, self.corrections[i].dtype)
            self.corrections[i].copy_(correction)
        self.tensors[i].copy_(value)

    def save(self, i: int, to: "Weights") -> None:
        """A copy, bit for bit."""
        to.tensors[i].copy_(self.tensors[i])
        if self.corrections:
            to.corrections[i].copy_(self.corrections[i])


def from_slow(new: Tensor, i: int, slow_from: Weights, slow_lr: float) -> Tensor:
    """The slow step (equation 9), folded into the last retain step: slow + alpha (fast - slow)."""
    return lerp(slow_from[i], new, slow_lr) if slow_from else new


def each(
    weights: Weights, grads: Sequence[Tensor], masks: Sequence[Tensor], slow_save: Weights
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """Index, parameter, gradient and mask of each tensor; saves the weights before the step."""
    params = weights.tensors
    grads, masks = spread(grads, params), spread_masks(masks, params)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if slow_save:
            # lazily: the weights a cycle starts from, stored by its forget step
            weights.save(i, slow_save)
        yield i, param, grad, selected_bits(masks, i, param)


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    corrections: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_save_corrections: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    slow_from_corrections: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    scalars: dict[str, Any],
) -> None:
    """What both steps demand of their arguments."""
    floats("params", params)
    aligned("grads", grads, params)
    aligned("slow_save", slow_save, params, optional=True)
    aligned("slow_from", slow_from, params, optional=True)
    correction_lists(
        params,
        corrections,
        slow_save_corrections=(slow_save, slow_save_corrections),
        slow_from_corrections=(slow_from, slow_from_corrections),
    )
    packed_masks(masks, params)
    scalar_tensors(params, norm=norm, grad_scale=grad_scale, found_inf=found_inf)
    scalar_tensors(params, torch.int64, skipped=scalars.get("skipped"))
    given = scalars["lr"], scalars["weight_decay"], scalars["slow_lr"]
    lr, weight_decay, slow_lr = numbers_of(scalars.get("numbers"), given, params)
    number("lr", lr, 0.0)
    number("weight_decay", weight_decay, 0.0)
    if scalars["max_norm"] != math.inf:  # inf: measured, not clipped
        number("max_norm", scalars["max_norm"], 0.0, open_low=True)
    number("slow_lr", slow_lr, 0.0, 1.0)
