"""What the reference kernels demand of their arguments; ``csrc/common/check.h`` demands the same
natively.

Every message names the argument, what was expected and what was found. A check never writes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from .lists import flat_size, is_flat, spread

FLOAT32_MAX = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtypes(param: torch.dtype) -> set[torch.dtype]:
    """The dtypes a moment may have beside a parameter: its own, and fp32; beside fp32 also bf16."""
    return {param, torch.bfloat16 if param == torch.float32 else torch.float32}


def strided(name: str, tensors: Sequence[Tensor], written: bool) -> None:
    """The tensors of a list are dense; and, if ``written``, no element would be written twice."""
    for i, t in enumerate(tensors):
        dense(f"{name}[{i}]", t, written)
    once = len(set(map(id, tensors))) == len(tensors)
    require(once or not written, name, "each tensor once", "one of them twice")


def dense(where: str, t: Any, written: bool) -> None:
    """One of them."""
    require(isinstance(t, Tensor), where, "a tensor", type(t).__name__)
    require(t.layout == torch.strided, where, "a dense tensor", t.layout)
    repeats = any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True))
    require(
        not (written and repeats and t.numel()),
        where,
        "a tensor to write to",
        "an expanded one",
        "clone it",
    )
    require(
        not (written and torch._is_zerotensor(t)),
        where,
        "a tensor to write to",
        "a zero tensor",
        "clone it",
    )


def one_device(*lists: Any) -> None:
    """All tensors of the arguments on one device: what a kernel checks, for fakes and meta tensors."""
    tensors = [t for item in lists for t in (item if isinstance(item, (list, tuple)) else [item])]
    devices = dict.fromkeys(t.device for t in tensors if isinstance(t, Tensor))
    require(len(devices) < 2, "tensors", "one device", " and ".join(map(str, devices)))


def _aligned(
    name: str,
    tensors: Sequence[Tensor],
    like: Sequence[Tensor],
    *,
    state: bool = False,
    optional: bool = False,
) -> None:
    """``tensors[i]`` has the shape, device and dtype of ``like[i]``; a ``state`` may be fp32, or
    bf16 beside fp32.
    """
    if optional and not tensors:
        return
    if is_flat(tensors, like):
        _flat(name, tensors[0], like, flat_size(like))
        tensors = spread(tensors, like)
    require(len(tensors) == len(like), name, f"{len(like)} tensors", len(tensors))
    for i, (tensor, model) in enumerate(zip(tensors, like, strict=True)):
        where = f"{name}[{i}]"
        require(
            tensor.shape == model.shape, where, f"shape {tuple(model.shape)}", tuple(tensor.shape)
        )
        require(tensor.device == model.device, where, f"device {model.device}", tensor.device)
        allowed = state_dtypes(model.dtype) if state else {model.dtype}
        names = " or ".join(sorted(str(d) for d in allowed))
        require(tensor.dtype in allowed, where, f"dtype {names}", tensor.dtype)


def _flat(name: str, flat: Tensor, like: Sequence[Tensor], size: int) -> None:
    expected = f"{len(like)} tensors, or a flat one of shape ({size},)"
    require(flat.shape == (size,), name, expected, f"one of shape {tuple(flat.shape)}")
    require(flat.device == like[0].device, f"{name}[0]", f"device {like[0].device}", flat.device)
    require(flat.is_contiguous(), f"{name}[0]", "a contiguous tensor", f"strides {flat.stride()}")


def _floats(name: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        where = f"{name}[{i}]"
        require(
            tensor.dtype in FLOATS, where, "float32, bfloat16, float16 or float64", tensor.dtype
        )
        require(
            tensor.device == tensors[0].device, where, f"device {tensors[0].device}", tensor.device
        )


def _masks(masks: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    if not masks:
        return
    if is_flat(masks, like):
        _flat("masks", masks[0], like, flat_size(like) // 8)
        require(masks[0].dtype == torch.uint8, "masks[0]", "packed bits in uint8", masks[0].dtype)
        return
    require(len(masks) == len(like), "masks", f"{len(like)} tensors", len(masks))
    for i, (mask, tensor) in enumerate(zip(masks, like, strict=True)):
        size = (tensor.numel() + 7) // 8
        require(mask.dtype == torch.uint8, f"masks[{i}]", "packed bits in uint8", mask.dtype)
        require(
            mask.dim() == 1 and mask.numel() in (0, size),
            f"masks[{i}]",
            f"{size} bytes for {tensor.numel()} weights (or 0 bytes: no mask)",
            tuple(mask.shape),
        )
        require(mask.device == tensor.device, f"masks[{i}]", f"device {tensor.device}", mask.device)


def _scalar_tensors(
    like: Sequence[Tensor], dtype: torch.dtype = torch.float32, /, **scalars: Tensor | None
) -> None:
    for name, scalar in scalars.items():
        if scalar is not None:
            require(scalar.numel() == 1, name, "one element", tuple(scalar.shape))
            require(scalar.dtype == dtype, name, str(dtype).removeprefix("torch."), scalar.dtype)
            require(
                not like or scalar.device == like[0].device,
                name,
                f"device {like[0].device}",
                scalar.device,
            )


def masked_grad_norm(
    grads: Sequence[Tensor], masks: Sequence[Tensor], grad_scale: Tensor | None
) -> None:
    _floats("grads", grads)
    _masks(masks, grads)
    _scalar_tensors(grads, grad_scale=grad_scale)


def _numbers(
    numbers: Tensor | None, given: tuple[Any, ...], like: Sequence[Tensor]
) -> tuple[Any, ...]:
    """The numbers ``given``, or those of the tensor where it can be read without waiting for a
    device.
    """
    if numbers is not None:
        shape = (len(given),)
        require(numbers.shape == shape, "numbers", f"shape {shape}", tuple(numbers.shape))
        require(numbers.dtype == torch.float64, "numbers", "dtype torch.float64", numbers.dtype)
        if like:
            require(
                numbers.device == like[0].device,
                "numbers",
                f"device {like[0].device}",
                numbers.device,
            )
        if numbers.device.type == "cpu":
            return tuple(numbers.tolist())
    return given


def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    scalars: dict[str, Any],
) -> None:
    _floats("params", params)
    _aligned("grads", grads, params)
    _aligned("slow_save", slow_save, params, optional=True)
    _aligned("slow_from", slow_from, params, optional=True)
    _masks(masks, params)
    _scalar_tensors(params, norm=norm, grad_scale=grad_scale, found_inf=found_inf)
    _scalar_tensors(params, torch.int64, skipped=scalars.get("skipped"))
    given = scalars["lr"], scalars["weight_decay"], scalars["slow_lr"]
    lr, weight_decay, slow_lr = _numbers(scalars.get("numbers"), given, params)
    number("lr", lr, 0.0)
    number("weight_decay", weight_decay, 0.0)
    if scalars["max_norm"] != math.inf:  # inf: measured, not clipped
        number("max_norm", scalars["max_norm"], 0.0, open_low=True)
    number("slow_lr", slow_lr, 0.0, 1.0)


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **scalars: Any,
) -> None:
    _step(params, grads, slow_save, slow_from, masks, norm, grad_scale, found_inf, scalars)
    _aligned("momentum_buffers", momentum_buffers, params, state=True, optional=True)
    number("momentum", scalars["momentum"], 0.0)
    number("dampening", scalars["dampening"], 0.0)


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **scalars: Any,
) -> None:
    _step(params, grads, slow_save, slow_from, masks, norm, grad_scale, found_inf, scalars)
    for name, state in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _aligned(name, state, params, state=True)
    _aligned("max_exp_avg_sqs", max_exp_avg_sqs, params, state=True, optional=True)
    for name, state in (("exp_avg_sqs", exp_avg_sqs), ("max_exp_avg_sqs", max_exp_avg_sqs)):
        for i, (average, square) in enumerate(
            zip(spread(exp_avgs, params), spread(state, params), strict=False)
        ):
            require(
                square.dtype == average.dtype,
                f"{name}[{i}]",
                f"{average.dtype}, as its exp_avg",
                square.dtype,
            )
    if is_flat(steps, params):
        _flat("steps", steps[0], params, len(params))
        require(steps[0].dtype == torch.float32, "steps[0]", "float32", steps[0].dtype)
    else:
        require(len(steps) == len(params), "steps", f"{len(params)} tensors", len(steps))
        _scalar_tensors(params, **{f"steps[{i}]": step for i, step in enumerate(steps)})
    for name in ("beta1", "beta2"):
        number(name, scalars[name], 0.0, 1.0)
        require(scalars[name] < 1.0, name, "a number in [0, 1)", scalars[name])
    number("eps", scalars["eps"], 0.0)


def interpolate_(
    slow: Sequence[Tensor], fast: Sequence[Tensor], slow_lr: float, numbers: Tensor | None = None
) -> None:
    _floats("slow", slow)
    _aligned("fast", fast, slow)
    (slow_lr,) = _numbers(numbers, (slow_lr,), slow)
    number("slow_lr", slow_lr, 0.0, 1.0)


def _fisher(name: str, fisher: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """fp32 (fp64 for fp64) beside each gradient and of its shape; or a flat list."""
    if is_flat(fisher, grads):
        _flat(name, fisher[0], grads, flat_size(grads))
        fisher = spread(fisher, grads)
    require(len(fisher) == len(grads), name, f"{len(grads)} tensors", len(fisher))
    for i, (f, g) in enumerate(zip(fisher, grads, strict=True)):
        wanted = torch.float64 if g.dtype == torch.float64 else torch.float32
        require(f.shape == g.shape, f"{name}[{i}]", f"shape {tuple(g.shape)}", tuple(f.shape))
        require(f.dtype == wanted, f"{name}[{i}]", f"dtype {wanted}", f.dtype)
        require(f.device == g.device, f"{name}[{i}]", f"device {g.device}", f.device)


def fisher_accumulate_(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, numbers: Tensor | None = None
) -> None:
    _floats("grads", grads)
    _fisher("fisher", fisher, grads)
    (weight,) = _numbers(numbers, (weight,), grads)
    number("weight", weight, 0.0)


def saliency_mask(
    forget: Sequence[Tensor], retain: Sequence[Tensor], threshold: float, eps: float
) -> None:
    for i, f in enumerate(forget):
        ok = f.dtype in (torch.float32, torch.float64)
        require(ok, f"forget[{i}]", "float32 or float64", f.dtype)
    _aligned("retain", retain, forget)
    number("threshold", threshold, 0.0, open_low=True)
    number("eps", eps, 0.0)
