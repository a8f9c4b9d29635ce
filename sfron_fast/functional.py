"""Stateless functions over lists of tensors: call the op, on dense copies where it wants them; bump
versions.

The optimizers are thin layers over these. A list argument that is ``None`` or empty means "absent";
state, slow weights and masks may be flat lists (``flat.py``). Tensors may be non-contiguous
(updated ones are then copied in and out); updated ones must not share memory. Of a DTensor the
local shard is meant, and masks are then of shards. fp64 goes to the reference kernels. Raises
ValueError or RuntimeError, naming the argument, before anything is written.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed.shards import is_sharded, local
from .errors import number, require
from .ops import reference, tables
from .ops import registry as ops
from .ops.arguments import strided
from .ops.layout import in_memory

Tensors = Sequence[Tensor]


def _call(
    name: str, lists: dict[str, Tensors], written: tuple[str, ...], *rest: Any, **scalars: Any
) -> Any:
    """The op on ``lists`` (in the schema's order) and ``rest``; bumps the versions of the first
    written lists.

    Lists can hold thousands of tensors, so nothing is looked at twice: a native kernel checks them
    all before it writes, and says so where it wants them contiguous or in another dtype. Only then
    the careful way is taken.
    """
    # torch's own remedy for a negated scalar fails beside arguments that are absent; this one is
    # written to
    counter = scalars.get("skipped")
    if isinstance(counter, Tensor) and not torch.compiler.is_compiling() and counter.is_neg():
        copy = in_memory(counter)
        result = _call(name, lists, written, *rest, **{**scalars, "skipped": copy})
        counter.copy_(copy)
        return result
    rest = tuple(in_memory(value) if type(value) is Tensor else value for value in rest)
    if type(scalars.get("numbers")) is Tensor:
        scalars["numbers"] = in_memory(scalars["numbers"])
    table = tables.table_of(
        lists.values()
    )  # first: it brings the tensors into the cache faster than Python does
    if torch.is_grad_enabled():
        _refuse_leaves({key: lists[key] for key in written})
    if table is None and any(is_sharded(t) for tensors in lists.values() for t in tensors):
        _touch(name, lists, written)  # a DTensor counts its versions itself
        lists = {key: [local(t) for t in tensors] for key, tensors in lists.items()}
        table = tables.table_of(lists.values())
    if table is not None:
        try:
            result = ops.TABLED[name](table, *rest, **scalars)
        except (
            ValueError,
            RuntimeError,
        ) as refusal:  # RuntimeError: how torch 2.15 hands on a kernel's error
            if "contiguous" not in str(refusal) and "float64" not in str(refusal):
                raise
        else:
            tables.spare.append(table)
            _touch(name, lists, written)
            return result
    given = {key: _strided(key, tensors, key in written) for key, tensors in lists.items()}
    dense = {key: [in_memory(t) for t in tensors] for key, tensors in given.items()}
    double = any(t.dtype == torch.float64 for tensors in dense.values() for t in tensors)
    kernel = ops.default_kernel(name) if double else getattr(ops, name)
    result = kernel(*dense.values(), *rest, **scalars)
    with torch.no_grad():
        for key in written:
            for target, copy in zip(given[key], dense[key], strict=True):
                if copy is not target:
                    target.copy_(copy)
    _touch(name, lists, written)
    return result


def _strided(name: str, tensors: Tensors, written: bool) -> Tensors:
    if not torch.compiler.is_compiling():  # guards on strides and identities would compile anew
        strided(name, tensors, written)
    return tensors


def _number(lr: float) -> float:
    return (
        float(lr) if torch.compiler.is_compiling() else number("lr", lr, 0.0)
    )  # a comparison would break the graph


def _touch(name: str, lists: dict[str, Tensors], written: tuple[str, ...]) -> None:
    """Tell autograd what a native kernel wrote behind its back; an optimizer's state is in no
    graph.
    """
    for key in written[: 2 if name == "interpolate_" else 1]:
        torch.autograd.graph.increment_version(lists[key])


def _refuse_leaves(lists: dict[str, Tensors]) -> None:
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.is_leaf:
                raise RuntimeError(
                    f"{name}[{i}]: expected a call under torch.no_grad(), found a leaf that"
                    " requires grad; an in-place update of it cannot be differentiated"
                )


def masked_grad_norm(
    grads: Tensors, masks: Tensors | None = None, *, grad_scale: Tensor | None = None
) -> Tensor:
    """L2 norm, fp32 [] on the gradients' device, of the selected gradients divided by
    ``grad_scale``.

    ``masks``: packed uint8 [ceil(n / 8)] per gradient, zero bytes = all selected. inf or NaN tells
    of a non-finite selected gradient. No host synchronisation. Source: README equation 6 (paper:
    clip of S * grad L^f).
    """
    if not grads:
        return torch.zeros(())
    with torch.no_grad():
        return _call("masked_grad_norm", {"grads": grads, "masks": masks or []}, (), grad_scale)


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
    slow_save: Tensors | None = None,
    slow_from: Tensors | None = None,
    slow_lr: float = 1.0,
    numbers: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """One fused pass of torch.optim.SGD over a list: unscale, mask, clip, decay, momentum, update,
    interpolate.

    Args: params, grads: tensors of equal shape, dtype, device. momentum_buffers: parameter-shaped,
        fp32 or the parameter's dtype, beside fp32 also bf16; ``first`` marks
            them uninitialised.
        masks: packed uint8 [ceil(n / 8)] each; deselected gradients count as zero, and with
            ``freeze_masked`` their weights and state keep their bits.
        norm: fp32 [], from ``masked_grad_norm``; clips to ``max_norm``; not finite = the update is
        skipped.
        grad_scale, found_inf: fp32 [], torch.amp's; gradients are divided by the first, skipped by
        the second.
        slow_save: receives the parameters as they were before the step (start of a cycle).
        slow_from, slow_lr: with them the result is slow + slow_lr (updated - slow) (end of a cycle).
        numbers: fp64 [3] on the parameters' device: lr, weight_decay and slow_lr in place of the
            numbers, so that a captured CUDA graph follows a schedule.
        skipped: int64 [] there, one more if the update is skipped.
    Raises:
        ValueError, RuntimeError: a bad argument, by name, before anything is written.
    """
    if not params:
        return require(not grads, "grads", "0 tensors", len(grads))
    lists = {
        "params": params,
        "grads": grads,
        "momentum_buffers": momentum_buffers or [],
        "slow_save": slow_save or [],
        "slow_from": slow_from or [],
        "masks": masks or [],
    }
    _call(
        "sgd_step_",
        lists,
        ("params", "momentum_buffers", "slow_save"),
        norm,
        grad_scale,
        found_inf,
        lr=_number(lr),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        first=first,
        freeze_masked=freeze_masked,
        max_norm=max_norm,
        slow_lr=slow_lr,
        numbers=numbers,
        skipped=skipped,
    )


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
    slow_save: Tensors | None = None,
    slow_from: Tensors | None = None,
    slow_lr: float = 1.0,
    numbers: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """One fused pass of torch.optim.AdamW (``decoupled``) or Adam over a list.

    ``steps``: fp32 [] per parameter, on its device, incremented here unless the update is skipped.
    Moments as ``momentum_buffers``, those of a parameter of one dtype; averages of bf16 beside fp32
    are dithered (``reference.dithered``). ``max_exp_avg_sqs`` switches AMSGrad on. The other
    arguments are those of ``sgd_step_``.
    """
    if not params:
        return require(not grads, "grads", "0 tensors", len(grads))
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs or [],
        "steps": steps,
        "slow_save": slow_save or [],
        "slow_from": slow_from or [],
        "masks": masks or [],
    }
    written = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "slow_save")
    _call(
        "adamw_step_",
        lists,
        written,
        norm,
        grad_scale,
        found_inf,
        lr=_number(lr),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
        freeze_masked=freeze_masked,
        max_norm=max_norm,
        slow_lr=slow_lr,
        numbers=numbers,
        skipped=skipped,
    )


def interpolate_(
    slow: Tensors, fast: Tensors, slow_lr: float, *, numbers: Tensor | None = None
) -> None:
    """slow += slow_lr (fast - slow), then fast = slow, over two lists of equal shapes (paper:
    R-on's
    slow step).

    ``numbers``: fp64 [1] beside the tensors: slow_lr in place of the number, which a captured CUDA
    graph and torch.compile would keep as it was.
    """
    if not slow:
        return require(not fast, "fast", "0 tensors", len(fast))
    _call("interpolate_", {"slow": slow, "fast": fast}, ("slow", "fast"), slow_lr, numbers)


def fisher_accumulate_(
    fisher: Tensors, grads: Tensors, weight: float, *, numbers: Tensor | None = None
) -> None:
    """fisher += weight * grad^2, fp32 accumulators (fp64 for fp64 gradients), in place.

    ``numbers``: fp64 [1] beside the tensors: weight in place of the number, as in ``interpolate_``.
    """
    if not fisher:
        return require(not grads, "grads", "0 tensors", len(grads))
    _call("fisher_accumulate_", {"fisher": fisher, "grads": grads}, ("fisher",), weight, numbers)


def saliency_mask(
    forget: Tensors, retain: Tensors, threshold: float, eps: float = reference.FISHER_EPS
) -> tuple[list[Tensor], Tensor]:
    """1[F_forget + eps >= threshold (F_retain + eps)], packed uint8 per tensor, and the counts
    int64 [tensors].
    """
    if not forget:
        require(not retain, "retain", "0 tensors", len(retain))
        return [], torch.zeros(0, dtype=torch.int64)
    return _call("saliency_mask", {"forget": forget, "retain": retain}, (), threshold, eps)
