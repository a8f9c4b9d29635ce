"""The cases of an optimizer's step: every arm, compiled, as a replayed graph; the clip's norm."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sfron_fast import functional
from sfron_fast.ops import reference

from ..harness import Arm, Case
from ..timer import replayed, warmed
from . import arms, probes
from .arms import ADAMW, MAX_NORM, SGD, Problem
from .lists import Shape, weights

SWEEP = "sweep, "
# least bytes a weight of a step; a clip reads gradient and mask twice, a pair stores and reads slow
# weights
FLOORS = {
    ("adamw", "plain"): 28.0,
    ("adamw", "forget"): 32.25,
    ("adamw", "pair"): 68.25,
    ("sgd", "plain"): 20.0,
    ("sgd", "forget"): 24.25,
    ("sgd", "pair"): 52.25,
}


def step_case(
    name: str,
    shapes: list[Shape],
    kind: str,
    work: str,
    device: str,
    cpu_masks: bool = False,
    seconds: float = 2.0,
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    narrow: bool = False,
) -> Case:
    """A step of every arm.

    A GPU's cache is flushed before each, so no list needs rotation, however small.

    ``narrow``: also with moments of bf16, and with 24-bit weights and moments of 8 bits, which move
    less than the bytes that the probe moves.
    """
    masks = 0.0 if work == "plain" else 0.25
    moved = int(((FLOORS[kind, work] - masks) * dtype.itemsize / 4 + masks) * weights(shapes))
    slow = 0.5 if work == "pair" else 1.0
    about = {
        "shapes": shapes,
        "kind": kind,
        "work": work,
        "slow_lr": slow,
        "device": device,
        "density": density,
        "dtype": dtype,
        "channels_last": channels_last,
    }
    made: list[Callable[[], Arm]] = [partial(probes.probe, moved, device)]
    bytes_of = partial(arms.held, shapes, kind=kind, work=work, dtype=dtype)
    held = [probes.probe_bytes(moved)]
    if work == "plain":
        made += [partial(arms.best_stock, **about)]
        held += [bytes_of(arms.STOCK[0])]
    else:
        authors = arms.AUTHORS[::-1] if cpu_masks else arms.AUTHORS[:1]
        made += [
            partial(arms.authors_style, **about, cpu_masks=who == arms.AUTHORS[1])
            for who in authors
        ]
        made += [partial(arms.best_stock, **about, how=how) for how in arms.STOCK]
        held += [bytes_of(who) for who in (*authors, *arms.STOCK)]
    if narrow:
        made += [partial(arms.ours, **about, state_dtype=torch.bfloat16)]
        held += [bytes_of("ours", state_dtype=torch.bfloat16)]
        made += [partial(arms.compact, shapes, kind, work, slow, device, density)]
        held += [bytes_of(arms.COMPACT)]
    made, held = [*made, partial(arms.ours, **about)], [*held, bytes_of("ours")]
    alpha, some = (
        ", alpha 0.5" if work == "pair" else "",
        ("" if density == 0.5 else f", {100 * density:g} % selected"),
    )
    kept = ("" if dtype == torch.float32 else ", bf16") + (
        ", channels-last" if channels_last else ""
    )
    title = f"{name}, {kind} {work}{alpha}{some}{kept}"
    return Case(
        title, made, moved, seconds, held=held, more=arms.compared(shapes, dtype, work != "plain")
    )


def long_case(name: str, shapes: list[Shape], device: str) -> Case:
    """A plain step of two arms: more would not fit beside each other."""
    moved = int(FLOORS["sgd", "plain"] * weights(shapes))
    made = [
        partial(probes.probe, moved, device),
        partial(arms.best_stock, shapes, "sgd", "plain", device=device),
        partial(arms.ours, shapes, "sgd", "plain", device=device),
    ]
    held = [
        probes.probe_bytes(moved),
        *(arms.held(shapes, who, "sgd", "plain") for who in (arms.STOCK[0], "ours")),
    ]
    return Case(f"{name}, sgd plain", made, moved, held=held, more=arms.compared(shapes))


def graph_case(name: str, shapes: list[Shape], kind: str, work: str, device: str) -> Case:
    moved = int(FLOORS[kind, work] * weights(shapes))

    def stock_eager() -> Arm:
        return warmed(arms.best_stock(shapes, kind, work, device=device))

    def stock_replayed() -> Arm:
        return replayed(arms.best_stock(shapes, kind, work, device=device), device)

    def ours_replayed() -> Arm:
        return replayed(arms.ours(shapes, kind, work, device=device), device)

    made = [partial(probes.probe, moved, device), stock_eager, stock_replayed, ours_replayed]
    return Case(f"{name}, {kind} {work}, replayed", made, moved)


def compiled_case(name: str, shapes: list[Shape], kind: str, device: str, backend: str) -> Case:
    moved = int(FLOORS[kind, "forget"] * weights(shapes))
    made = [
        partial(probes.probe, moved, device),
        partial(compiled_stock, shapes, kind, device, backend),
        partial(arms.ours, shapes, kind, "forget", device=device),
    ]
    # time to compile
    return Case(f"{name}, {kind} forget, compiled", made, moved, needs=0.2 * len(shapes))


def compiled_stock(shapes: list[Shape], kind: str, device: str, backend: str = "inductor") -> Arm:
    """The stock maths of a forget step as one compiled function, which writes no gradient.

    Masks of the kind that is faster there: Inductor's CPU code of a bool mask takes several times
    that of a float one.
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

    compiled = torch.compile(
        adamw if kind == "adamw" else sgd, fullgraph=True, dynamic=False, backend=backend
    )
    masks = problem.masks if device == "cuda" else [m.float() for m in problem.masks]

    def run() -> None:
        compiled(params, grads, masks, first, second, step)

    return arms.list_arm("torch.compile of stock maths", problem, run)


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
    return Case(f"{name}, masked norm", [partial(probes.probe, moved, device), stock, ours], moved)
