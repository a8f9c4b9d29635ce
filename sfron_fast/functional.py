"""Stateless functions over lists of tensors: make them dense, call the op, bump the version counters.

The optimizers are thin layers over these. A list argument that is ``None`` or empty means "absent"; state, slow
weights and masks may be flat lists (``flat.py``). Updated
tensors may be non-contiguous (they are copied in and out; contiguous ones are updated in place). fp64 goes to
the reference kernels. Raises ValueError or RuntimeError, naming the argument, before anything is written.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .checks import require

Tensors = Sequence[Tensor]


_PLAIN = {Tensor, torch.nn.Parameter}


def _op(name: str, tensors: Tensors) -> Callable[..., Any]:
    """The native or default kernel; fp64 has only the reference, behind the same checks."""
    if torch.float64 in {t.dtype for t in tensors}:  # dynamo cannot trace an attrgetter
        return ops.default_kernel(name)
    return getattr(ops, name)


def _dense(tensors: Tensors) -> bool:
    """True for contiguous tensors that are no subclass; a few nanoseconds each, lists can be long."""
    return _PLAIN.issuperset(map(type, tensors)) and all(map(Tensor.is_contiguous, tensors))


def _local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor (it shares storage); any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def _read(tensors: Tensors | None) -> Tensors:
    """Inputs as contiguous local tensors."""
    if not tensors:
        return []
    return tensors if _dense(tensors) else [_local(t).contiguous() for t in tensors]


class _Written:
    """Outputs as contiguous local tensors; copies the stand-ins of non-contiguous ones back at the end."""

    def __init__(self, **lists: Tensors | None) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.lists = [self._writable(name, tensors) if tensors else [] for name, tensors in lists.items()]

    def _writable(self, name: str, tensors: Tensors) -> Tensors:
        if torch.is_grad_enabled():
            for i, tensor in enumerate(tensors):
                if tensor.requires_grad and tensor.is_leaf:
                    raise RuntimeError(
                        f"{name}[{i}]: expected a call under torch.no_grad(), found a leaf that requires grad; "
                        "an in-place update of it cannot be differentiated"
                    )
        if _dense(tensors):
            return tensors
        dense = []
        for local in map(_local, tensors):
            dense.append(local.contiguous())
            if dense[-1] is not local:
                self.copies.append((local, dense[-1]))
        return dense

    def finish(self, touched: Tensors) -> None:
        """Copy back, then tell autograd what native kernels wrote behind its back (state is in no graph)."""
        with torch.no_grad():
            for target, copy in self.copies:
                target.copy_(copy)
        torch.autograd.graph.increment_version(touched)


def masked_grad_norm(grads: Tensors, masks: Tensors | None = None, *, grad_scale: Tensor | None = None) -> Tensor:
    """L2 norm, fp32 [] on the gradients' device, of the selected gradients divided by ``grad_scale``.

    ``masks``: packed uint8 [ceil(n / 8)] per gradient, zero bytes = all selected. inf or NaN tells of a
    non-finite selected gradient. No host synchronisation. Source: README equation 6 (paper: clip of S * grad L^f).
    """
    if not grads:
        return torch.zeros(())
    with torch.no_grad():
        return _op("masked_grad_norm", grads)(_read(grads), masks or [], grad_scale)


def sgd_step_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    masks: Tensors | None = None,
    freeze_masked: bool = False,
    norm: Tensor | None = None,
    max_norm: float = float("inf"),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    slow_out: Tensors | None = None,
    slow_in: Tensors | None = None,
    slow_lr: float = 1.0,
    hyper: Tensor | None = None,
) -> None:
    """One fused pass of torch.optim.SGD over a list: unscale, mask, clip, decay, momentum, update, interpolate.

    Args:
        params, grads: tensors of equal shape, dtype, device.
        momentum_buffers: parameter-shaped, fp32 or the parameter's dtype; ``first`` marks them uninitialised.
        masks: packed uint8 [ceil(n / 8)] each; deselected gradients count as zero, and with ``freeze_masked``
            their weights and state keep their bits.
        norm: fp32 [], from ``masked_grad_norm``; clips to ``max_norm``; not finite = the update is skipped.
        grad_scale, found_inf: fp32 [], torch.amp's; gradients are divided by the first, skipped by the second.
        slow_out: receives the parameters as they were before the step (start of a cycle).
        slow_in, slow_lr: with them the result is slow + slow_lr (updated - slow) (end of a cycle).
        hyper: fp64 [3] on the parameters' device: lr, weight_decay and slow_lr in place of the numbers, so that a
            captured CUDA graph follows a schedule.
    Raises:
        ValueError, RuntimeError: a bad argument, by name, before anything is written.
    """
    if not params:
        return require(not grads, "grads", "0 tensors", len(grads))
    written = _Written(params=params, momentum_buffers=momentum_buffers, slow_out=slow_out)
    p, m, so = written.lists
    _op("sgd_step_", p)(
        p, _read(grads), m, so, _read(slow_in), masks or [], norm, grad_scale, found_inf,
        lr=float(lr), momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
        maximize=maximize, first=first, freeze_masked=freeze_masked, max_norm=max_norm, slow_lr=slow_lr, hyper=hyper,
    )  # fmt: skip
    written.finish(params)


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    max_exp_avg_sqs: Tensors | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    masks: Tensors | None = None,
    freeze_masked: bool = False,
    norm: Tensor | None = None,
    max_norm: float = float("inf"),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    slow_out: Tensors | None = None,
    slow_in: Tensors | None = None,
    slow_lr: float = 1.0,
    hyper: Tensor | None = None,
) -> None:
    """One fused pass of torch.optim.AdamW (``decoupled``) or Adam over a list.

    ``steps``: fp32 [] per parameter, on its device, incremented here unless the update is skipped.
    ``max_exp_avg_sqs`` switches AMSGrad on. The other arguments are those of ``sgd_step_``.
    """
    if not params:
        return require(not grads, "grads", "0 tensors", len(grads))
    written = _Written(
        params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs,
        steps=steps, slow_out=slow_out,
    )  # fmt: skip
    p, m, v, vmax, s, so = written.lists
    _op("adamw_step_", p)(
        p, _read(grads), m, v, vmax, s, so, _read(slow_in), masks or [], norm, grad_scale, found_inf,
        lr=float(lr), beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=decoupled,
        maximize=maximize, freeze_masked=freeze_masked, max_norm=max_norm, slow_lr=slow_lr, hyper=hyper,
    )  # fmt: skip
    written.finish(params)


def interpolate_(slow: Tensors, fast: Tensors, slow_lr: float) -> None:
    """slow += slow_lr (fast - slow), then fast = slow, over two lists of equal shapes (paper: R-on's slow step)."""
    if not slow:
        return require(not fast, "fast", "0 tensors", len(fast))
    written = _Written(slow=slow, fast=fast)
    s, f = written.lists
    _op("interpolate_", s)(s, f, slow_lr)
    written.finish([*slow, *fast])


def fisher_accumulate_(fisher: Tensors, grads: Tensors, weight: float) -> None:
    """fisher += weight * grad^2, fp32 accumulators (fp64 for fp64 gradients), in place."""
    if not fisher:
        return require(not grads, "grads", "0 tensors", len(grads))
    written = _Written(fisher=fisher)
    (f,) = written.lists
    _op("fisher_accumulate_", f)(f, _read(grads), weight)
    written.finish(fisher)


def saliency_mask(
    forget: Tensors, retain: Tensors, threshold: float, eps: float = reference.FISHER_EPS
) -> tuple[list[Tensor], Tensor]:
    """1[F_forget + eps >= threshold (F_retain + eps)], packed uint8 per tensor, and the counts int64 [tensors]."""
    if not forget:
        require(not retain, "retain", "0 tensors", len(retain))
        return [], torch.zeros(0, dtype=torch.int64)
    return _op("saliency_mask", [*forget, *retain])(_read(forget), _read(retain), threshold, eps)
