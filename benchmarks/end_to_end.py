"""Whole unlearning cycles on real models, phase by phase: what a faster step is worth in a run.

A cycle is a forget step and a retain step with a slow interpolation; its Fisher and mask stage is measured beside it.
Every arm trains its own copy of one model on the same batches, and all must arrive at the same weights.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfron_fast as sf
from sfron_fast import functional, reference

from .arms import MAX_NORM
from .harness import Row, difference, make_row
from .models import Decoder, ResNet18

SLOW_LR, TEMPERATURE, FLOOR, FORGET_WEIGHT = 0.5, 0.5, 1e-6, 0.1
Batch = tuple[Tensor, Tensor]


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

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], kind: str) -> None:
        self.model = model
        make: Any = {"sgd": sf.SFRonSGD, "adamw": sf.SFRonAdamW}[kind]
        self.optimizer = make(model.named_parameters(), **SETTINGS[kind], saliency=sf.SaliencyMask.from_bool(masks),
                              max_norm=MAX_NORM, slow_lr=SLOW_LR)  # fmt: skip

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sf.adaptive_cross_entropy(logits, labels, TEMPERATURE, floor=FLOOR)

    def forget(self, phase: Phases) -> None:
        with phase("mask, clip and update"):
            self.optimizer.forget_step()

    def retain(self, phase: Phases) -> None:
        with phase("update and interpolation"):
            self.optimizer.step()

    def accumulate(self, sums: list[Tensor], share: float) -> None:
        functional.fisher_accumulate_(sums, [p.grad for p in self.model.parameters()], share)

    def build(self, forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
        return functional.saliency_mask(forget, retain, 1.0)[0]


class Stock:
    """What a careful user writes with torch alone."""

    name = "stock, fused"

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], kind: str) -> None:
        self.model, self.params = model, list(model.parameters())
        self.masks = [mask.float() for mask in masks.values()]  # faster than bool
        make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
        self.optimizer = make(self.params, **SETTINGS[kind], fused=True)
        self.slow_weights = [p.detach().clone() for p in self.params]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        losses = losses.view(labels.shape).flatten(1).mean(1) if labels.dim() > 1 else losses
        raw = losses.detach().clamp_min(FLOOR).pow(-TEMPERATURE)
        return (raw / raw.sum() * losses).sum()

    def forget(self, phase: Phases) -> None:
        with phase("mask"):
            torch._foreach_mul_([p.grad for p in self.params], self.masks)
        with phase("clip"):
            nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        with phase("update"):
            self.optimizer.step()

    def retain(self, phase: Phases) -> None:
        with phase("update"):
            self.optimizer.step()
        with phase("interpolation"), torch.no_grad():
            torch._foreach_lerp_(self.slow_weights, self.params, SLOW_LR)
            torch._foreach_copy_(self.params, self.slow_weights)

    def accumulate(self, sums: list[Tensor], share: float) -> None:
        grads = [p.grad for p in self.params]
        torch._foreach_addcmul_(sums, grads, grads, share)

    def build(self, forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
        eps = reference.FISHER_EPS
        return [(f + eps) / (r + eps) >= 1.0 for f, r in zip(forget, retain, strict=True)]


class Authors(Stock):
    """The published loop's shape: tensor by tensor, default optimizer, deepcopy."""

    name = "authors' style"

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], kind: str) -> None:
        super().__init__(model, masks, kind)
        make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
        self.optimizer = make(self.params, **SETTINGS[kind])
        self.original = copy.deepcopy(self.params)

    def forget(self, phase: Phases) -> None:
        with phase("mask"):
            for p, mask in zip(self.params, self.masks, strict=True):
                p.grad *= mask
        with phase("clip"):
            nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        with phase("update"):
            self.optimizer.step()

    def retain(self, phase: Phases) -> None:
        with phase("update"):
            self.optimizer.step()
        with phase("interpolation"):
            for p, o in zip(self.params, self.original, strict=True):
                p.data.copy_((1.0 - SLOW_LR) * o.data + SLOW_LR * p.data)
            self.original = copy.deepcopy(self.params)

    def accumulate(self, sums: list[Tensor], share: float) -> None:
        for f, p in zip(sums, self.params, strict=True):
            f += p.grad.cpu().to(f.device) ** 2 * share


SETTINGS = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-4, "weight_decay": 0.01},
}


def cycle(arm: Any, forget: Batch, retain: Batch, phase: Phases) -> None:
    """One forget and one retain step."""
    for (inputs, labels), forgets in ((forget, True), (retain, False)):
        arm.model.zero_grad()
        with phase("forward"):
            logits = arm.model(inputs)
            loss = -FORGET_WEIGHT * arm.loss(logits, labels) if forgets else mean_loss(logits, labels)
        with phase("backward"):
            loss.backward()
        (arm.forget if forgets else arm.retain)(phase)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def saliency(arm: Any, forget: Batch, retain: Batch, phase: Phases) -> None:
    """Both Fishers from two batches each, and the mask."""
    fishers = []
    for inputs, labels in (forget, retain):
        sums = [torch.zeros_like(p) for p in arm.model.parameters()]
        for _ in range(2):
            arm.model.zero_grad()
            with phase("forward"):
                loss = mean_loss(arm.model(inputs), labels)
            with phase("backward"):
                loss.backward()
            with phase("accumulation"):
                arm.accumulate(sums, 0.5)
        fishers.append(sums)
    with phase("mask build"):
        arm.build(*fishers)


def problem(name: str, device: str, tiny: bool) -> tuple[str, nn.Module, Batch, Batch]:
    """(optimizer, model, forget batch, retain batch); sizes a CPU can bear, larger ones for a GPU."""
    torch.manual_seed(0)
    large = device == "cuda"
    if name == "ResNet-18":
        batch = 2 if tiny else 256 if large else 16
        model: nn.Module = ResNet18(width=4 if tiny else 64 if large else 32)
        batches = [(torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device))
                   for _ in range(2)]  # fmt: skip
        return "sgd", model.to(device), batches[0], batches[1]
    vocabulary, width, layers, length, batch = (
        (50, 64, 1, 8, 2) if tiny else (32_000, 1024, 12, 512, 8) if large else (8_192, 256, 4, 64, 8)
    )
    model = Decoder(vocabulary, width, layers, length)
    draw = lambda: torch.randint(vocabulary, (batch, length), device=device)  # noqa: E731
    return "adamw", model.to(device), (draw(), draw()), (draw(), draw())


WORK: dict[str, Callable[[Any, Batch, Batch, Phases], None]] = {"cycle": cycle, "Fisher and mask": saliency}


def measure(name: str, device: str, rounds: int = 7, tiny: bool = False) -> list[Row]:
    """Rows of the whole and of every phase, arms in turn. Raises AssertionError if the arms' weights differ."""
    kind, model, forget, retain = problem(name, device, tiny)
    masks = {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters()}
    arms = [make(copy.deepcopy(model), masks, kind) for make in (Authors, Stock, Ours)]
    start, ends = list(model.parameters()), []
    for arm in arms:
        cycle(arm, forget, retain, Phases(device, False))
        ends.append([p.detach() - q.detach() for p, q in zip(arm.model.parameters(), start, strict=True)])
    for arm, end in zip(arms[1:], ends[1:], strict=True):
        if not (error := difference(end, ends[0])) < 1e-2:
            raise AssertionError(f"{name}: {arm.name} and {arms[0].name} differ by {error:.1e}; nothing was timed")
    size = f"{sum(p.numel() for p in start) / 1e6:.1f}M, batch {forget[0].shape[0]}"
    rows = []
    for work, run in WORK.items():
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        for turn in range(rounds):
            for arm in arms if turn % 2 == 0 else arms[::-1]:
                whole, split = Phases(device, False), Phases(device, True)
                began = whole.wait()
                run(arm, forget, retain, whole)
                times["", arm.name].append(whole.wait() - began)
                run(arm, forget, retain, split)
                for phase, seconds in split.seconds.items():
                    times[phase, arm.name].append(seconds)
        for (phase, arm_name), seconds in sorted(times.items(), key=lambda item: item[0][0]):
            rows.append(make_row(f"{name} {work}{': ' + phase if phase else f' ({size})'}", arm_name, seconds, 0))
    return rows
