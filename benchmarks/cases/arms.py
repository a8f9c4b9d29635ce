"""The optimizer's work as different people write it: the authors, a careful user, this package."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sfron_fast as sf
from sfron_fast.ops.split_weights import join

from ..harness import Arm, uncounted
from .lists import Shape, weights

ADAMW = {"lr": 1e-4, "weight_decay": 0.01}
# clipped gradients: smaller steps would drown in rounding
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
MAX_NORM = 1.0


class Problem:
    """Parameters, gradients and masks of one arm; every arm gets equal ones."""

    def __init__(
        self,
        shapes: list[Shape],
        device: str = "cpu",
        density: float = 0.5,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        # where a step of ADAMW moves most weights by several roundings
        size = 1.0 if dtype == torch.float32 else 1e-3
        self.params = [nn.Parameter(torch.randn(s, **on, dtype=dtype).mul_(size)) for s in shapes]
        self.gradients = [torch.randn(s, **on, dtype=dtype).mul_(1e-3) for s in shapes]
        self.masks = [torch.rand(s, **on) < density for s in shapes]
        if channels_last:
            for tensors in (self.gradients, self.masks):
                tensors[:] = map(last, tensors)
            self.params = [nn.Parameter(last(p.detach())) for p in self.params]
        for p, g in zip(self.params, self.gradients, strict=True):
            p.grad = g

    def prepare(self, work: str) -> None:
        """A pair has two lists of gradients: the retain ones must not be found masked in place."""
        self.others = [g.clone() for g in self.gradients] if work == "pair" else []

    def next_gradients(self) -> None:
        """The other list: as after a backward pass gradients lie elsewhere, yet no bytes move."""
        with uncounted:
            now = [p.grad for p in self.params]
            for p, g in zip(self.params, self.others, strict=True):
                p.grad = g
            self.others = now

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"p{i}", p) for i, p in enumerate(self.params)]

    def saliency(self) -> sf.SaliencyMask:
        return sf.SaliencyMask.from_bool({f"p{i}": m for i, m in enumerate(self.masks)})

    def values(self) -> list[Tensor]:
        return [p.detach() for p in self.params]


def last(tensor: Tensor) -> Tensor:
    """A convolution's weight as ``model.to(memory_format=torch.channels_last)`` lays it out."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def change(values: Callable[[], list[Tensor]], run: Callable[[], Any]) -> list[Tensor]:
    """What ``run`` takes off the values; the values themselves would hardly show a step."""
    before = [value.clone() for value in values()]
    run()
    # and not a second copy, for which the longest lists leave no room
    torch._foreach_sub_(before, values())
    return before


def held(
    shapes: list[Shape],
    who: str,
    kind: str,
    work: str,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that an arm keeps on its device; ``who``: "ours", one of STOCK, or of AUTHORS."""
    size, moments = dtype.itemsize, 2 if kind == "adamw" else 1
    if who == COMPACT:  # bf16, a correction, codes and their scales, masks as ours
        return int(
            (2 * 2 + 1 + moments * (1 + 4 / 256) + 3 * (work == "pair") + 0.25) * weights(shapes)
        )
    weight = size * (3 if work == "pair" else 2)  # parameters and gradients
    weight += moments * (state_dtype or dtype).itemsize
    if who in AUTHORS:
        weight += size + (who == AUTHORS[0])  # the copy for the interpolation
    else:
        weight += size * (work == "pair")  # slow weights
        # ours: packed, by name and as one list
        masks = {"ours": 0.25, "bool mask": 1}.get(who, size)
        weight += masks * (work != "plain")
    return int(weight * weights(shapes))


COMPACT = "sfron_fast, 24-bit weights, 8-bit moments"


def compact(
    shapes: list[Shape], kind: str, work: str, slow_lr: float, device: str, density: float
) -> Arm:
    """This package's optimizer on bf16 parameters that lose nothing; work as ``ours``.

    The last of 24 bits is as large as some of a step.
    """
    problem = Problem(shapes, device, density)
    problem.params = [nn.Parameter(p.detach().bfloat16()) for p in problem.params]
    problem.gradients = [g.bfloat16() for g in problem.gradients]
    for p, g in zip(problem.params, problem.gradients, strict=True):
        p.grad = g
    optimizer, run = _steps(problem, kind, work, slow_lr, weight_bits=24, state_dtype=torch.int8)
    optimizer.init_state()

    def values() -> list[Tensor]:
        pieces = [(p.detach(), optimizer.state[p]["correction"]) for p in problem.params]
        return [join(*piece) for piece in pieces]

    return Arm(COMPACT, run, lambda: change(values, run), tolerance=0.3, values=values)


def compared(shapes: list[Shape], dtype: torch.dtype = torch.float32, unfused: bool = False) -> int:
    """Bytes of two arms' results, their comparison in fp32, and torch's ``unfused`` optimizers."""
    work = max(dtype.itemsize * unfused, 8 * (dtype != torch.float32))
    return weights(shapes) * (2 * dtype.itemsize + work)


def list_arm(name: str, problem: Problem, run: Callable[[], Any]) -> Arm:
    return Arm(
        name, run, lambda: change(problem.values, run), tolerance=1e-2, values=problem.values
    )


def ours(
    shapes: list[Shape],
    kind: str,
    work: str,
    slow_lr: float = 1.0,
    device: str = "cpu",
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Arm:
    """This package's optimizer; ``work``: "plain" retain step, "forget" step, or "pair" of both."""
    problem = Problem(shapes, device, density, dtype, channels_last)
    _, run = _steps(problem, kind, work, slow_lr, state_dtype=state_dtype)
    return list_arm(
        "sfron_fast" if state_dtype is None else "sfron_fast, bf16 moments", problem, run
    )


def _steps(
    problem: Problem, kind: str, work: str, slow_lr: float, **settings: Any
) -> tuple[Any, Callable[[], None]]:
    """The optimizer, and the work that is measured."""
    problem.prepare(work)
    masked = work != "plain"
    saliency = problem.saliency() if masked else None
    problem.masks = []
    make, common = (sf.SFRonAdamW, ADAMW) if kind == "adamw" else (sf.SFRonSGD, SGD)
    optimizer = make(
        problem.named(),
        **common,
        saliency=saliency,
        max_norm=MAX_NORM if masked else None,
        retain_steps=1,
        slow_lr=slow_lr,
        **settings,
    )

    def run() -> None:
        if work == "plain":
            optimizer.step()
            return
        optimizer.forget_step()
        if work == "pair":
            problem.next_gradients()
            optimizer.step()
        else:  # a forget step alone: declare its cycle over
            for group in optimizer.param_groups:
                group["retain_pending"] = 0

    return optimizer, run


def _torch_optimizer(problem: Problem, kind: str, **flags: bool) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(problem.params, **ADAMW, **flags)
    return torch.optim.SGD(problem.params, **SGD, **flags)


AUTHORS = ("authors' style", "authors' style, masks on CPU")
STOCK = ("bool mask", "float mask", "float mask, clip in the step")


def best_stock(
    shapes: list[Shape],
    kind: str,
    work: str,
    slow_lr: float = 1.0,
    how: str = "bool mask",
    device: str = "cpu",
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Arm:
    """A careful user's stock torch: foreach mask, clip, lerp and copy, a fused optimizer.

    "clip in the step": what an expert writes; the clip is handed to the fused step as GradScaler's
    divisor.
    """
    problem = Problem(shapes, device, density, dtype, channels_last)
    problem.prepare(work)
    optimizer = _torch_optimizer(problem, kind, fused=True)
    masks = (
        problem.masks
        if how == "bool mask" or work == "plain"
        else [m.to(dtype) for m in problem.masks]
    )
    problem.masks = []
    if work == "plain":
        masks = []
    slow = [value.clone() for value in problem.values()] if slow_lr < 1.0 else []

    def run() -> None:
        if work != "plain":
            # the gradient is written; multiplying by 0 and 1 again and again costs the same
            grads = [p.grad for p in problem.params]
            torch._foreach_mul_(grads, masks)
            if how.endswith("clip in the step"):
                norm = nn.utils.get_total_norm(grads, foreach=True)
                optimizer.grad_scale = ((norm.float() + 1e-6) / MAX_NORM).clamp(min=1.0)
            else:
                nn.utils.clip_grad_norm_(problem.params, MAX_NORM, foreach=True)
        optimizer.step()
        if work == "pair":
            problem.next_gradients()
            optimizer.grad_scale = None
            optimizer.step()
            if slow:
                with torch.no_grad():
                    torch._foreach_lerp_(slow, problem.params, slow_lr)
                    torch._foreach_copy_(problem.params, slow)

    name = f"stock, fused ({how})" if work != "plain" else "torch fused=True"
    return list_arm(name, problem, run)


def authors_style(
    shapes: list[Shape],
    kind: str,
    work: str,
    slow_lr: float = 1.0,
    device: str = "cpu",
    cpu_masks: bool = False,
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Arm:
    """The published loop: mask, clip and interpolation by tensor, default optimizer, deepcopy.

    ``cpu_masks``: as published, where the masks stay on the CPU and cross to the GPU in every step.
    """
    problem = Problem(shapes, device, density, dtype, channels_last)
    problem.prepare(work)
    if cpu_masks:
        problem.masks = [mask.cpu() for mask in problem.masks]
    optimizer = _torch_optimizer(problem, kind)
    original = copy.deepcopy(problem.params)

    def run() -> None:
        nonlocal original
        for p, mask in zip(problem.params, problem.masks, strict=True):
            p.grad *= mask.to(p.device)
        nn.utils.clip_grad_norm_(problem.params, MAX_NORM)
        optimizer.step()
        if work == "pair":
            problem.next_gradients()
            optimizer.step()
            for p, o in zip(problem.params, original, strict=True):
                p.data.copy_((1.0 - slow_lr) * o.data + slow_lr * p.data)
            original = copy.deepcopy(problem.params)

    return list_arm(AUTHORS[cpu_masks], problem, run)
