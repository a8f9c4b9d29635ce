"""The cases of the saliency stage: Fisher and mask."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sfron_fast import functional
from sfron_fast.ops import reference

from ..harness import Arm, Case
from . import probes
from .arms import Problem
from .lists import Shape, weights


def fisher_case(name: str, shapes: list[Shape], device: str, published: bool = False) -> Case:
    """F += g^2 / n. ``published``: gradients cross to the CPU and are squared and added there."""
    share = 0.01

    def over_cpu(sums: list[Tensor], grads: list[Tensor]) -> None:
        for f, g in zip(sums, grads, strict=True):
            f += g.cpu() ** 2 * share

    def naive(sums: list[Tensor], grads: list[Tensor]) -> None:
        for f, g in zip(sums, grads, strict=True):
            f += g**2 * share

    def foreach(sums: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_addcmul_(sums, grads, grads, share)

    def ours(sums: list[Tensor], grads: list[Tensor]) -> None:
        functional.fisher_accumulate_(sums, grads, share)

    def arm(
        title: str, add: Callable[[list[Tensor], list[Tensor]], None], where: str = device
    ) -> Arm:
        grads, sums = (
            Problem(shapes, device).gradients,
            [torch.zeros(s, device=where) for s in shapes],
        )

        def check() -> list[Tensor]:
            add(sums, grads)
            return [f.to(device, copy=True) for f in sums]

        return Arm(title, lambda: add(sums, grads), check)

    moved = 12 * weights(shapes)
    made: list[Callable[[], Arm]] = [partial(probes.probe, moved, device)]
    made += [partial(arm, "as published, on the CPU", over_cpu, "cpu")] if published else []
    made += [
        partial(arm, "per tensor, on the device", naive),
        partial(arm, "foreach addcmul", foreach),
    ]
    return Case(f"{name}, Fisher accumulate", [*made, partial(arm, "sfron_fast", ours)], moved)


def stock_mask(forget: list[Tensor], retain: list[Tensor], threshold: float = 1.0) -> list[Tensor]:
    """F_f + eps >= threshold (F_r + eps) in two kernels a tensor.

    The ratio's bits where a Fisher is much above eps.
    """
    above = reference.FISHER_EPS * (threshold - 1.0)
    return [torch.sub(f, r, alpha=threshold) >= above for f, r in zip(forget, retain, strict=True)]


def mask_case(name: str, shapes: list[Shape], device: str) -> Case:
    eps, threshold = reference.FISHER_EPS, 1.0  # at 1, quotient and product round alike

    def fishers() -> list[list[Tensor]]:
        on = {"generator": torch.Generator(device).manual_seed(1), "device": device}
        return [[torch.rand(s, **on) for s in shapes] for _ in range(2)]

    def ratio() -> Arm:
        forget, retain = fishers()

        def run() -> list[Tensor]:
            return [(f + eps) / (r + eps) >= threshold for f, r in zip(forget, retain, strict=True)]

        return Arm("torch ratio and compare", run, run)

    def careful() -> Arm:
        forget, retain = fishers()
        run = partial(stock_mask, forget, retain, threshold)
        return Arm("torch difference and compare", run, run, tolerance=0.0)

    def ours() -> Arm:
        forget, retain = fishers()

        def run() -> list[Tensor]:
            return functional.saliency_mask(forget, retain, threshold)[0]

        def check() -> list[Tensor]:
            return [reference.unpack_bits(m, s) for m, s in zip(run(), shapes, strict=True)]

        return Arm("sfron_fast", run, check, tolerance=0.0)

    moved = int(8.125 * weights(shapes))
    return Case(
        f"{name}, mask build", [partial(probes.probe, moved, device), ratio, careful, ours], moved
    )
