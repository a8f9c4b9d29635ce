"""The list cases: optimizer steps, norm, Fisher, mask."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sfron_fast import functional, reference

from . import arms, peers
from .arms import ADAMW, MAX_NORM, SGD, Problem
from .harness import Arm
from .lists import Shape, ddpm_unet, dit_xl2, llama_1b, resnet18, sd14_unet, small_tensors, swin_t
from .timer import replayed, warmed

SWEEP = "sweep, "
FLOORS = {  # least bytes a weight of a step; a clip reads gradient and mask twice, a pair stores and reads slow weights
    ("adamw", "plain"): 28.0, ("adamw", "forget"): 32.25, ("adamw", "pair"): 68.25,
    ("sgd", "plain"): 20.0, ("sgd", "forget"): 24.25, ("sgd", "pair"): 52.25,
}  # fmt: skip


@dataclass
class Case:
    """``arms`` are made one by one, so that one that cannot be made costs only itself; the last is this package."""

    name: str
    arms: Sequence[Callable[[], Arm]]
    bytes: int = 0
    seconds: float = 2.0
    needs: float = 0.0  # seconds, for what cannot be interrupted


def weights(shapes: list[Shape]) -> int:
    return sum(torch.Size(s).numel() for s in shapes)


def cases(kind: str, device: str, tiny: bool) -> list[Case]:
    """The selection for a ``kind`` of device, most important first; ``tiny``: on lists of a few thousand weights."""
    return (gpu_cases if kind == "cuda" else cpu_cases)(device, tiny)


def cpu_cases(device: str, tiny: bool) -> list[Case]:
    wide = resnet18(4) if tiny else resnet18(96)
    many, medium = small_tensors(50 if tiny else 4_000, 64), small_tensors(20 if tiny else 1_000, 1_024)
    name, on = "ResNet-18 x 1.5", {"device": device, "seconds": 8.0}
    return [
        step_case(name, wide, "adamw", "forget", **on),
        step_case(name, wide, "adamw", "pair", **on),
        step_case(name, wide, "sgd", "forget", **on),
        step_case(name, wide, "adamw", "plain", **on),
        step_case(name, wide, "sgd", "plain", **on),
        step_case("4,000 x 64", many, "adamw", "pair", **on),
        fisher_case(name, wide, device),
        mask_case(name, wide, device),
        last_gradient_case(name, wide, device),
        step_case("1,000 x 1,024", medium, "adamw", "forget", device),
        step_case("10,000 x 64", small_tensors(60 if tiny else 10_000, 64), "adamw", "forget", device),
        step_case("Swin-T", [(8, 8)] if tiny else swin_t(), "adamw", "forget", device),
        step_case("DDPM U-Net", [(8, 8)] if tiny else ddpm_unet(), "adamw", "pair", device),
        *density_cases(name, wide, device),
        step_case(name, wide, "adamw", "forget", device, dtype=torch.bfloat16),
        *sweep_cases(device, [1_000] if tiny else [10**5, 10**6, 10**7, 10**8]),
    ]


def gpu_cases(device: str, tiny: bool) -> list[Case]:
    dit = dit_xl2(16, 1) if tiny else dit_xl2()
    resnet = resnet18(4) if tiny else resnet18()
    many, medium = small_tensors(50 if tiny else 10_000, 64), small_tensors(20 if tiny else 1_000, 1_024)
    return [
        step_case("DiT-XL/2", dit, "adamw", "forget", device, cpu_masks=True, seconds=4.0),
        step_case("DiT-XL/2", dit, "adamw", "pair", device, cpu_masks=True, seconds=4.0),
        graph_case("ResNet-18", resnet, "sgd", "forget", device),
        step_case("ResNet-18", resnet, "sgd", "forget", device, cpu_masks=True),
        step_case("ResNet-18", resnet, "sgd", "pair", device),
        step_case("10,000 x 64", many, "adamw", "forget", device),
        fisher_case("DiT-XL/2", dit, device),
        mask_case("DiT-XL/2", dit, device),
        last_gradient_case("DiT-XL/2", dit, device),
        fisher_case("ResNet-18", resnet, device, published=True),
        step_case("DiT-XL/2", dit, "adamw", "plain", device),
        step_case("DiT-XL/2", dit, "sgd", "plain", device),
        step_case("DiT-XL/2", dit, "sgd", "forget", device),
        step_case("DiT-XL/2", dit, "adamw", "forget", device, dtype=torch.bfloat16),
        norm_case("DiT-XL/2", dit, device),
        step_case("1,000 x 1,024", medium, "adamw", "forget", device),
        step_case("10,000 x 64", many, "sgd", "plain", device),
        long_case("1 x (2^31 + 1)", [(99,)] if tiny else [(2**31 + 1,)], device),
        step_case("Llama-3.2-1B", [(8, 8)] if tiny else llama_1b(), "adamw", "forget", device),
        step_case("SD 1.4 U-Net", [(8, 8)] if tiny else sd14_unet(), "adamw", "pair", device),
        step_case("DDPM U-Net", [(8, 8)] if tiny else ddpm_unet(), "adamw", "pair", device),
        step_case("Swin-T", [(8, 8)] if tiny else swin_t(), "adamw", "forget", device),
        *density_cases("DiT-XL/2", dit, device),
        *sweep_cases(device, [1_000] if tiny else [10**5, 10**6, 10**7, 10**8, 10**9]),
    ]


def density_cases(name: str, shapes: list[Shape], device: str) -> list[Case]:
    """Fewer weights selected; the other cases select half."""
    return [step_case(name, shapes, "adamw", "forget", device, density=density) for density in (0.1, 0.01)]


def sweep_cases(device: str, sizes: list[int]) -> list[Case]:
    """Time against the number of weights, in tensors of at most a million."""
    return [
        step_case(f"{SWEEP}{n:,} weights", [(min(n, 10**6),)] * max(1, n // 10**6), "adamw", "forget", device)
        for n in sizes
    ]


def compile_cases(kind: str, device: str, tiny: bool) -> list[Case]:
    """Apart, to be run last: compiling may take longer than everything else."""
    backend = "aot_eager" if tiny else "inductor"
    lists = {("ResNet-18", "sgd"): resnet18(4) if tiny else resnet18()}
    if kind == "cuda":
        lists["DiT-XL/2", "adamw"] = dit_xl2(16, 1) if tiny else dit_xl2()
    return [
        Case(
            f"{name}, {rule} forget, compiled",
            [partial(arms.probe, int(FLOORS[rule, "forget"] * weights(shapes)), device),
             partial(compiled_stock, shapes, rule, device, backend),
             partial(arms.ours, shapes, rule, "forget", device=device)],
            int(FLOORS[rule, "forget"] * weights(shapes)),
            needs=0.2 * len(shapes),  # time to compile
        )
        for (name, rule), shapes in lists.items()
    ]  # fmt: skip


def step_case(
    name: str, shapes: list[Shape], kind: str, work: str, device: str, cpu_masks: bool = False, seconds: float = 2.0,
    density: float = 0.5, dtype: torch.dtype = torch.float32,
) -> Case:
    """A step of every arm. A GPU's cache is flushed before each, so lists need no rotation, small ones included."""
    masks = 0.0 if work == "plain" else 0.25
    moved = int(((FLOORS[kind, work] - masks) * dtype.itemsize / 4 + masks) * weights(shapes))
    slow = 0.5 if work == "pair" else 1.0
    about = {"shapes": shapes, "kind": kind, "work": work, "slow_lr": slow, "device": device, "density": density,
             "dtype": dtype}  # fmt: skip
    made: list[Callable[[], Arm]] = [partial(arms.probe, moved, device)]
    if work == "plain":
        made += [partial(arms.best_stock, **about), *(partial(peers.peer, name, **about) for name in peers.PEERS)]
    else:
        made += [partial(arms.authors_style, **about, cpu_masks=True)] if cpu_masks else []
        made += [partial(arms.authors_style, **about)]
        made += [partial(arms.best_stock, **about, how=how) for how in arms.STOCK]
    alpha, some = ", alpha 0.5" if work == "pair" else "", "" if density == 0.5 else f", {100 * density:g} % selected"
    kept = "" if dtype == torch.float32 else ", bf16"
    return Case(f"{name}, {kind} {work}{alpha}{some}{kept}", [*made, partial(arms.ours, **about)], moved, seconds)


def long_case(name: str, shapes: list[Shape], device: str) -> Case:
    """A plain step of two arms: more would not fit beside each other."""
    moved = int(FLOORS["sgd", "plain"] * weights(shapes))
    made = [partial(arms.probe, moved, device), partial(arms.best_stock, shapes, "sgd", "plain", device=device),
            partial(arms.ours, shapes, "sgd", "plain", device=device)]  # fmt: skip
    return Case(f"{name}, sgd plain", made, moved)


def graph_case(name: str, shapes: list[Shape], kind: str, work: str, device: str) -> Case:
    moved = int(FLOORS[kind, work] * weights(shapes))

    def stock_eager() -> Arm:
        return warmed(arms.best_stock(shapes, kind, work, device=device))

    def stock_replayed() -> Arm:
        return replayed(arms.best_stock(shapes, kind, work, device=device), device)

    def ours_replayed() -> Arm:
        return replayed(arms.ours(shapes, kind, work, device=device), device)

    made = [partial(arms.probe, moved, device), stock_eager, stock_replayed, ours_replayed]
    return Case(f"{name}, {kind} {work}, replayed", made, moved)


def compiled_stock(shapes: list[Shape], kind: str, device: str, backend: str = "inductor") -> Arm:
    """The stock maths of a forget step as one compiled function; unlike stock torch it writes no gradient.

    Masks of the kind that is faster there: Inductor's CPU code of a bool mask takes several times that of a float one.
    """
    problem = Problem(shapes, device)
    grads = [p.grad for p in problem.params]
    params = [p.detach() for p in problem.params]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    step = torch.zeros((), device=device)

    def clipped(grads: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        masked = torch._foreach_mul(grads, masks)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(masked)))
        return torch._foreach_mul(masked, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))

    def adamw(params, grads, masks, first, second, step) -> None:
        beta1, beta2, lr = 0.9, 0.999, ADAMW["lr"]
        g = clipped(grads, masks)
        step += 1
        torch._foreach_mul_(params, 1.0 - lr * ADAMW["weight_decay"])
        torch._foreach_lerp_(first, g, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, g, g, 1.0 - beta2)
        size, root = lr / (1.0 - beta1**step), (1.0 - beta2**step).sqrt()
        below = torch._foreach_add(torch._foreach_div(torch._foreach_sqrt(second), root), 1e-8)
        torch._foreach_sub_(params, torch._foreach_mul(torch._foreach_div(first, below), size))

    def sgd(params, grads, masks, first, second, step) -> None:
        g = torch._foreach_add(clipped(grads, masks), params, alpha=SGD["weight_decay"])
        torch._foreach_mul_(first, SGD["momentum"])
        torch._foreach_add_(first, g)
        torch._foreach_sub_(params, first, alpha=SGD["lr"])

    compiled = torch.compile(adamw if kind == "adamw" else sgd, fullgraph=True, dynamic=False, backend=backend)
    masks = problem.masks if device == "cuda" else [m.float() for m in problem.masks]

    def run() -> None:
        compiled(params, grads, masks, first, second, step)

    return arms.list_arm("torch.compile of stock maths", problem, run)


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

    def arm(title: str, add: Callable[[list[Tensor], list[Tensor]], None], where: str = device) -> Arm:
        grads, sums = Problem(shapes, device).gradients, [torch.zeros(s, device=where) for s in shapes]

        def check() -> list[Tensor]:
            add(sums, grads)
            return [f.to(device, copy=True) for f in sums]

        return Arm(title, lambda: add(sums, grads), check)

    moved = 12 * weights(shapes)
    made: list[Callable[[], Arm]] = [partial(arms.probe, moved, device)]
    made += [partial(arm, "as published, on the CPU", over_cpu, "cpu")] if published else []
    made += [partial(arm, "per tensor, on the device", naive), partial(arm, "foreach addcmul", foreach)]
    return Case(f"{name}, Fisher accumulate", [*made, partial(arm, "sfron_fast", ours)], moved)


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
        run = partial(arms.stock_mask, forget, retain, threshold)
        return Arm("torch difference and compare", run, run, tolerance=0.0)

    def ours() -> Arm:
        forget, retain = fishers()

        def run() -> list[Tensor]:
            return functional.saliency_mask(forget, retain, threshold)[0]

        def check() -> list[Tensor]:
            return [reference.unpack_bits(m, s) for m, s in zip(run(), shapes, strict=True)]

        return Arm("sfron_fast", run, check, tolerance=0.0)

    moved = int(8.125 * weights(shapes))
    return Case(f"{name}, mask build", [partial(arms.probe, moved, device), ratio, careful, ours], moved)


def last_gradient_case(name: str, shapes: list[Shape], device: str) -> Case:
    moved = int(16.125 * weights(shapes))
    made = [partial(arms.last_gradient, shapes, how, device) for how in arms.LAST_GRADIENT]
    return Case(f"{name}, last Fisher gradient and mask", [partial(arms.probe, moved, device), *made], moved)


def norm_case(name: str, shapes: list[Shape], device: str) -> Case:
    def stock() -> Arm:
        problem = Problem(shapes, device)

        def run() -> list[Tensor]:
            masked = torch._foreach_mul(problem.gradients, problem.masks)
            return [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(masked)))]

        return Arm("foreach mask and norm", run, run)

    def ours() -> Arm:
        problem = Problem(shapes, device)
        packed = [reference.pack_bits(m) for m in problem.masks]

        def run() -> list[Tensor]:
            return [functional.masked_grad_norm(problem.gradients, packed)]

        return Arm("sfron_fast", run, run)

    moved = int(4.125 * weights(shapes))
    return Case(f"{name}, masked norm", [partial(arms.probe, moved, device), stock, ours], moved)
