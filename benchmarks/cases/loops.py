"""The pieces of a whole cycle as different people write them, each timed phase by phase."""

import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfron_fast as sf
from sfron_fast import functional
from sfron_fast.ops import reference
from sfron_fast.saliency.gradients import SquareSums

from .arms import MAX_NORM
from .row_arms import FLOOR, TEMPERATURE, weighted
from .saliency_cases import stock_mask

SLOW_LR = 0.5
SETTINGS = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-4, "weight_decay": 0.01},
}


class Phases:
    """Seconds by name; a device is waited for at both ends, unless only the whole is asked for."""

    def __init__(self, device: str, split: bool) -> None:
        self.device, self.split = device, split
        self.seconds: dict[str, float] = defaultdict(float)

    def wait(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.split:
            yield
            return
        start = self.wait()
        yield
        self.seconds[name] += self.wait() - start


class Ours:
    name = "sfron_fast"

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], kind: str, retain_steps: int
    ) -> None:
        self.model, self.params, self.retain_steps = model, list(model.parameters()), retain_steps
        make: Any = {"sgd": sf.SFRonSGD, "adamw": sf.SFRonAdamW}[kind]
        self.optimizer = make(
            model.named_parameters(),
            **SETTINGS[kind],
            saliency=sf.SaliencyMask.from_bool(masks),
            max_norm=MAX_NORM,
            slow_lr=SLOW_LR,
            retain_steps=retain_steps,
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sf.adaptive_cross_entropy(logits, labels, TEMPERATURE, floor=FLOOR)

    def forget(self, phase: Phases) -> None:
        with phase("mask, clip and update"):
            self.optimizer.forget_step()

    def retain(self, phase: Phases, last: bool) -> None:
        with phase("update and interpolation" if last else "update"):
            self.optimizer.step()

    def sums(self) -> SquareSums:
        """As ``estimate_fisher`` makes them."""
        return SquareSums({n: torch.zeros_like(p) for n, p in self.model.named_parameters()})

    def accumulate(self, sums: SquareSums, share: float) -> None:
        sums.add([p.grad for p in self.params], share)

    def build(self, forget: SquareSums, retain: SquareSums) -> list[Tensor]:
        return functional.saliency_mask(forget.sums, retain.sums, 1.0)[0]

    def bits(self, masks: list[Tensor]) -> list[Tensor]:
        shapes = [p.shape for p in self.params]
        return [reference.unpack_bits(m, s) for m, s in zip(masks, shapes, strict=True)]


class Stock:
    """What a careful user writes with torch alone."""

    name = "stock, fused"

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], kind: str, retain_steps: int
    ) -> None:
        self.model, self.params, self.retain_steps = model, list(model.parameters()), retain_steps
        # faster than bool: one kernel for many tensors
        self.masks = [mask.float() for mask in masks.values()]
        make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
        self.optimizer = make(self.params, **SETTINGS[kind], fused=True)
        self.slow_weights = [p.detach().clone() for p in self.params]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        losses = losses.view(labels.shape).flatten(1).mean(1) if labels.dim() > 1 else losses
        return weighted(losses)

    def forget(self, phase: Phases) -> None:
        grads = [p.grad for p in self.params]
        with phase("mask"):
            torch._foreach_mul_(grads, self.masks)
        with phase("clip"):  # the fastest of arms.STOCK: the step divides by it
            norm = nn.utils.get_total_norm(grads, foreach=True)
            self.optimizer.grad_scale = ((norm + 1e-6) / MAX_NORM).clamp(min=1.0)
        with phase("update"):
            self.optimizer.step()
        self.optimizer.grad_scale = None

    def retain(self, phase: Phases, last: bool) -> None:
        with phase("update"):
            self.optimizer.step()
        if last:
            with phase("interpolation"), torch.no_grad():
                self.interpolate()

    def interpolate(self) -> None:
        torch._foreach_lerp_(self.slow_weights, self.params, SLOW_LR)
        torch._foreach_copy_(self.params, self.slow_weights)

    def sums(self) -> list[Tensor]:
        return [torch.zeros_like(p) for p in self.params]

    def accumulate(self, sums: list[Tensor], share: float) -> None:
        grads = [p.grad for p in self.params]
        torch._foreach_addcmul_(sums, grads, grads, share)

    def build(self, forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
        return stock_mask(forget, retain)

    def bits(self, masks: list[Tensor]) -> list[Tensor]:
        return masks


class Authors(Stock):
    """The published loop's shape: tensor by tensor, default optimizer, deepcopy."""

    name = "authors' style"
    where: str | None = None  # of masks and Fishers; None = beside the parameters

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], kind: str, retain_steps: int
    ) -> None:
        super().__init__(model, masks, kind, retain_steps)
        make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
        self.optimizer = make(self.params, **SETTINGS[kind])
        self.masks = [mask.to(self.where) for mask in masks.values()]
        self.slow_weights = []
        self.original = copy.deepcopy(self.params)

    def forget(self, phase: Phases) -> None:
        with phase("mask"):
            for p, mask in zip(self.params, self.masks, strict=True):
                p.grad *= mask.to(p.device)
        with phase("clip"):
            nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        with phase("update"):
            self.optimizer.step()

    def interpolate(self) -> None:
        for p, o in zip(self.params, self.original, strict=True):
            p.data.copy_((1.0 - SLOW_LR) * o.data + SLOW_LR * p.data)
        self.original = copy.deepcopy(self.params)

    def sums(self) -> list[Tensor]:
        return [torch.zeros_like(p, device=self.where) for p in self.params]

    def accumulate(self, sums: list[Tensor], share: float) -> None:
        for f, p in zip(sums, self.params, strict=True):
            f += p.grad.to(f.device) ** 2 * share

    def build(self, forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
        eps = reference.FISHER_EPS
        return [(f + eps) / (r + eps) >= 1.0 for f, r in zip(forget, retain, strict=True)]

    def bits(self, masks: list[Tensor]) -> list[Tensor]:
        return [mask.to(p.device) for mask, p in zip(masks, self.params, strict=True)]


class Published(Authors):
    """As published, where masks and Fishers stay on the CPU."""

    name = "authors' style, masks on CPU"
    where = "cpu"
