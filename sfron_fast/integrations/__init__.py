"""SFR-on inside other training frameworks. Nothing here is imported by the rest of the package."""

from typing import Any

from torch import Tensor

from ..errors import require
from ..optim.base import SFRonOptimizer


def unwrap(optimizer: Any) -> SFRonOptimizer:
    """The optimizer under what Accelerate, Lightning or a Trainer put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    require(
        isinstance(optimizer, SFRonOptimizer),
        "optimizer",
        "SFRonSGD or SFRonAdamW",
        type(optimizer).__name__,
        "with a Hugging Face Trainer pass optimizer_cls_and_kwargs=(optimizer_factory, {...}) from "
        "sfron_fast.integrations.transformers",
    )
    return optimizer


def forget_step(optimizer: Any, scaler: Any = None) -> None:
    """``forget_step()`` of an optimizer that a framework has wrapped, with its GradScaler if it has
    one.

    Gradients are unscaled before they are masked and clipped; an overflow skips the step, phase
    included: no cycle is open then. The scale is updated. A retain step may be skipped too: ask
    ``mid_cycle`` before the next forget step.

    Raises:
        ValueError: no optimizer of this package.
        RuntimeError: the previous cycle still has retain steps to do.
    """
    inner = unwrap(optimizer)
    if scaler is None:
        inner.forget_step()
    else:
        scaler.step(inner.forget)
        scaler.update()


def forget_metrics(optimizer: Any) -> dict[str, Tensor]:
    """What the last step of the optimizer clipped, for a log, straight after ``forget_step``: [] on
    the device, so nothing waits for it. Lightning: ``self.log_dict(forget_metrics(opt))``.

    ``forget_grad_norm`` of the masked gradient, and ``forget_clip_factor``, 1 = not clipped; none
    of an optimizer without ``max_norm``.

    Raises:
        ValueError: no optimizer of this package.
    """
    inner = unwrap(optimizer)
    norm, limit = inner.grad_norm, inner.param_groups[0]["max_norm"]
    if norm is None or limit is None:
        return {}
    norm = norm.detach().clone()
    return {"forget_grad_norm": norm, "forget_clip_factor": (limit / norm).clamp_max(1.0)}
