"""``Step``: what a phase asks of an update rule for one batch."""

from typing import NamedTuple

from torch import Tensor

from .. import functional
from .batch import Batch


class Step(NamedTuple):
    """The arguments that ``functional.sgd_step_`` and ``adamw_step_`` share, and the phase."""

    forget: bool  # else a retain step
    lr: float
    weight_decay: float
    slow_lr: float
    numbers: Tensor | None  # those three, where one is a tensor; they are not read then
    maximize: bool
    masks: list[Tensor]  # of a forget step; none = all are selected
    freeze_masked: bool
    norm: Tensor | None
    max_norm: float
    grad_scale: Tensor | None
    found_inf: Tensor | None
    slow_save: list[Tensor] | None  # filled at the start of a cycle
    slow_from: list[Tensor] | None  # interpolated with at its end
    corrections: list[Tensor]  # of weights in two pieces, and of their slow ones; none = of one
    slow_save_corrections: list[Tensor]
    slow_from_corrections: list[Tensor]
    skipped: Tensor | None  # where this batch counts the step if it is skipped


def sgd_step(
    batch: Batch,
    step: Step,
    momentum_buffers: list[Tensor] | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    scales: list[Tensor] | None = None,
    steps: list[Tensor] | None = None,
) -> None:
    """``functional.sgd_step_`` of a batch."""
    params, grads = batch.arguments()
    functional.sgd_step_(
        params,
        grads,
        momentum_buffers,
        lr=step.lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=step.weight_decay,
        nesterov=nesterov,
        maximize=step.maximize,
        first=first,
        masks=step.masks,
        freeze_masked=step.freeze_masked,
        norm=step.norm,
        max_norm=step.max_norm,
        grad_scale=step.grad_scale,
        found_inf=step.found_inf,
        slow_save=step.slow_save,
        slow_from=step.slow_from,
        slow_lr=step.slow_lr,
        numbers=step.numbers,
        skipped=step.skipped,
        scales=scales,
        steps=steps,
        corrections=step.corrections,
        slow_save_corrections=step.slow_save_corrections,
        slow_from_corrections=step.slow_from_corrections,
    )
