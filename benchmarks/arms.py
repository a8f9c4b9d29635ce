"""The optimizer's work as different people write it: the authors' loop, the best stock composition, this package."""

import copy

import torch
from torch import Tensor, nn

import sfron_fast as sf

from .harness import Arm
from .lists import Shape

ADAMW = {"lr": 1e-4, "weight_decay": 0.01}
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
MAX_NORM = 1.0


class Problem:
    """Parameters, gradients and masks of one arm; every arm gets equal ones."""

    def __init__(self, shapes: list[Shape], density: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        self.gradients = [torch.randn(s, generator=generator) * 1e-3 for s in shapes]
        self.masks = [torch.rand(s, generator=generator) < density for s in shapes]
        self.numel = sum(p.numel() for p in self.params)
        for p, g in zip(self.params, self.gradients, strict=True):
            p.grad = g.clone()

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"p{i}", p) for i, p in enumerate(self.params)]

    def saliency(self) -> sf.SaliencyMask:
        return sf.SaliencyMask.from_bool({f"p{i}": m for i, m in enumerate(self.masks)})

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def _checked(problem: Problem, run) -> list[Tensor]:
    run()
    return problem.values()


def _arm(name: str, problem: Problem, run) -> Arm:
    return Arm(name, run, lambda: _checked(problem, run))


def ours(shapes: list[Shape], kind: str, work: str, slow_lr: float = 1.0) -> Arm:
    """This package's optimizer; ``work``: "plain" retain step, "forget" step, or "pair" of both."""
    problem = Problem(shapes)
    masked = work != "plain"
    make, settings = (sf.SFRonAdamW, ADAMW) if kind == "adamw" else (sf.SFRonSGD, SGD)
    optimizer = make(
        problem.named(), **settings, saliency=problem.saliency() if masked else None,
        max_norm=MAX_NORM if masked else None, retain_steps=1, slow_lr=slow_lr,
    )  # fmt: skip

    def run() -> None:
        if work == "plain":
            optimizer.step()
            return
        optimizer.forget_step()
        if work == "pair":
            optimizer.step()
        else:  # a forget step alone: declare its cycle over
            for group in optimizer.param_groups:
                group["retain_pending"] = 0

    return _arm("sfron_fast", problem, run)


def _torch_optimizer(problem: Problem, kind: str, **flags: bool) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(problem.params, **ADAMW, **flags)
    return torch.optim.SGD(problem.params, **SGD, **flags)


def best_stock(shapes: list[Shape], kind: str, work: str, slow_lr: float = 1.0, mask_dtype: str = "bool") -> Arm:
    """A careful user's stock torch: device masks, foreach clip, fused optimizer, foreach lerp and copy."""
    problem = Problem(shapes)
    optimizer = _torch_optimizer(problem, kind, fused=True)
    masks = problem.masks if mask_dtype == "bool" else [m.float() for m in problem.masks]
    slow = problem.values() if slow_lr < 1.0 else []

    def run() -> None:
        if work != "plain":
            # the gradient is written; multiplying by 0 and 1 again and again costs the same
            torch._foreach_mul_([p.grad for p in problem.params], masks)
            nn.utils.clip_grad_norm_(problem.params, MAX_NORM, foreach=True)
        optimizer.step()
        if work == "pair":
            for p, g in zip(problem.params, problem.gradients, strict=True):
                p.grad = g  # the retain gradient; no bytes move
            optimizer.step()
            if slow:
                with torch.no_grad():
                    torch._foreach_lerp_(slow, problem.params, slow_lr)
                    torch._foreach_copy_(problem.params, slow)

    name = f"stock, fused ({mask_dtype} mask)" if work != "plain" else "torch fused=True"
    return _arm(name, problem, run)


def authors_style(shapes: list[Shape], kind: str, work: str, slow_lr: float = 1.0) -> Arm:
    """The published loop's shape: per-tensor mask, clip, default optimizer, deepcopy, per-tensor interpolation."""
    problem = Problem(shapes)
    optimizer = _torch_optimizer(problem, kind)
    original = copy.deepcopy(problem.params)

    def run() -> None:
        nonlocal original
        for p, mask in zip(problem.params, problem.masks, strict=True):
            p.grad *= mask
        nn.utils.clip_grad_norm_(problem.params, MAX_NORM)
        optimizer.step()
        if work == "pair":
            for p, g in zip(problem.params, problem.gradients, strict=True):
                p.grad = g
            optimizer.step()
            for p, o in zip(problem.params, original, strict=True):
                p.data.copy_((1.0 - slow_lr) * o.data + slow_lr * p.data)
            original = copy.deepcopy(problem.params)

    return _arm("authors' style", problem, run)


def inplace_scale(moved: int) -> Arm:
    """The probe: an in-place scale that moves the same bytes (half read, half written)."""
    buffer = torch.ones(moved // 8)
    return Arm("probe: in-place scale", lambda: buffer.mul_(1.0))
