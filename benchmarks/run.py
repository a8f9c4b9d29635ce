"""`make bench` = `python -m benchmarks.run`: the CPU kernels against stock PyTorch, ratios from one run.

The last arm of every case is this package through its public API. Byte counts are floors: what the work must move
at least (fp32: AdamW reads p, g, m, v and writes p, m, v = 28 bytes a weight; the norm reads g; a mask is 1/8 byte).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import sfron_fast as sf
from sfron_fast import _native, functional, reference

from . import arms, harness
from .harness import Arm, Row
from .lists import resnet18, small_tensors

LARGE = resnet18(width=96)
WEIGHTS = sum(torch.Size(s).numel() for s in LARGE)


def optimizer_cases() -> list[tuple[str, Callable[[], list[Arm]], float]]:
    """(case, arms, floor bytes per weight) on 25.1M weights in 62 tensors."""
    return [
        ("adamw forget", lambda: [
            arms.authors_style(LARGE, "adamw", "forget"), arms.best_stock(LARGE, "adamw", "forget"),
            arms.best_stock(LARGE, "adamw", "forget", mask_dtype="float"), arms.ours(LARGE, "adamw", "forget"),
        ], 32.25),
        ("adamw pair, alpha 0.5", lambda: [
            arms.authors_style(LARGE, "adamw", "pair", 0.5), arms.best_stock(LARGE, "adamw", "pair", 0.5),
            arms.best_stock(LARGE, "adamw", "pair", 0.5, mask_dtype="float"), arms.ours(LARGE, "adamw", "pair", 0.5),
        ], 68.25),
        ("sgd forget", lambda: [
            arms.authors_style(LARGE, "sgd", "forget"), arms.best_stock(LARGE, "sgd", "forget"),
            arms.best_stock(LARGE, "sgd", "forget", mask_dtype="float"), arms.ours(LARGE, "sgd", "forget"),
        ], 24.25),
        ("adamw plain", lambda: [arms.best_stock(LARGE, "adamw", "plain"), arms.ours(LARGE, "adamw", "plain")], 28.0),
        ("sgd plain", lambda: [arms.best_stock(LARGE, "sgd", "plain"), arms.ours(LARGE, "sgd", "plain")], 20.0),
    ]  # fmt: skip


def probe_cases() -> list[tuple[str, Callable[[], list[Arm]], float]]:
    """The step against an in-place scale of the same bytes: what the memory gives."""
    return [
        ("adamw forget vs probe",
         lambda: [arms.inplace_scale(int(32.25 * WEIGHTS)), arms.ours(LARGE, "adamw", "forget")], 32.25),
        ("adamw pair vs probe",
         lambda: [arms.inplace_scale(int(68.25 * WEIGHTS)), arms.ours(LARGE, "adamw", "pair", 0.5)], 68.25),
    ]  # fmt: skip


def small_case() -> list[Arm]:
    """4,000 tensors of 64 elements: host time."""
    shapes = small_tensors()
    return [
        arms.authors_style(shapes, "adamw", "pair", 0.5),
        arms.best_stock(shapes, "adamw", "pair", 0.5),
        arms.best_stock(shapes, "adamw", "pair", 0.5, mask_dtype="float"),
        arms.ours(shapes, "adamw", "pair", 0.5),
    ]


def fisher_arms() -> list[Arm]:
    problem = arms.Problem(LARGE)
    stock, mine = ([torch.zeros(s) for s in LARGE] for _ in range(2))
    grads = problem.gradients

    def foreach() -> None:
        torch._foreach_addcmul_(stock, grads, grads, 0.01)

    return [
        Arm("foreach addcmul", foreach),
        Arm("sfron_fast", lambda: functional.fisher_accumulate_(mine, grads, 0.01)),
    ]


def mask_arms() -> list[Arm]:
    generator = torch.Generator().manual_seed(1)
    forget, retain = ([torch.rand(s, generator=generator) for s in LARGE] for _ in range(2))
    eps = reference.FISHER_EPS

    def stock() -> list[torch.Tensor]:
        return [(f + eps) / (r + eps) >= 1.0 for f, r in zip(forget, retain, strict=True)]

    def ours() -> list[torch.Tensor]:
        return functional.saliency_mask(forget, retain, 1.0)[0]

    return [
        Arm("torch ratio and compare", stock, stock),
        Arm("sfron_fast", ours, lambda: [reference.unpack_bits(m, s) for m, s in zip(ours(), LARGE, strict=True)], 0.0),
    ]


def cross_entropy_arms(rows: int, classes: int) -> list[Arm]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()

    def stock() -> list[torch.Tensor]:
        logits.grad = None
        losses = F.cross_entropy(logits, labels, reduction="none")
        raw = losses.detach().clamp_min(1e-6).pow(-0.5)
        (raw / raw.sum() * losses).sum().backward()
        return [logits.grad]

    def ours() -> list[torch.Tensor]:
        logits.grad = None
        sf.adaptive_cross_entropy(logits, labels, 0.5).backward()
        return [logits.grad]

    return [Arm("eager torch", stock, stock), Arm("sfron_fast", ours, ours)]


def measure(only: str, seconds: float) -> list[Row]:
    """Every case whose name contains ``only``."""
    cases = [(name, make, int(floor * WEIGHTS)) for name, make, floor in optimizer_cases() + probe_cases()]
    cases += [
        ("4,000 x 64, adamw pair", small_case, 0),
        ("fisher accumulate", fisher_arms, 12 * WEIGHTS),
        ("mask build", mask_arms, int(8.125 * WEIGHTS)),
        ("last Fisher gradient and mask", lambda: [arms.last_gradient(LARGE, how) for how in arms.LAST_GRADIENT],
         int(16.125 * WEIGHTS)),
        ("cross-entropy 8192 x 1000", lambda: cross_entropy_arms(8192, 1000), 0),
        ("cross-entropy 1024 x 32000", lambda: cross_entropy_arms(1024, 32000), 0),
    ]
    rows: list[Row] = []
    for name, make, moved in cases:
        if only in name:
            print(f"{name} ...", flush=True)
            rows += harness.time_case(name, make(), moved, seconds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=8.0, help="time per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if not _native.available():
        print(f"note: no native kernels ({_native.reason()}); this times the reference")
    rows = measure(chosen.only, chosen.seconds)
    if rows:
        harness.save(rows, chosen.out)
        print("\n" + harness.show(rows))


if __name__ == "__main__":
    main()
