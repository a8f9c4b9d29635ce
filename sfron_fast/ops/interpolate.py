"""The slow step: docs/equations.md, 9 (paper: R-on)."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import number, require
from . import calls, registry
from .arguments import aligned, floats, numbers_of
from .dtypes import wide
from .lists import listed, spread


def formula(
    slow: Sequence[Tensor], fast: Sequence[Tensor], slow_lr: float, numbers: Tensor | None = None
) -> None:
    """slow += alpha (fast - slow); fast = slow (equation 9)."""
    slow_lr = slow_lr if numbers is None else numbers.item()
    for s, f in zip(slow, spread(fast, slow), strict=True):
        s.copy_(lerp(wide(s), wide(f), slow_lr))
        f.copy_(s)


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """start + weight (end - start), from the nearer end, as torch.lerp does."""
    if weight < 0.5:
        return start + (end - start) * weight
    return end - (end - start) * (1.0 - weight)


def check(
    slow: Sequence[Tensor], fast: Sequence[Tensor], slow_lr: float, numbers: Tensor | None = None
) -> None:
    """What the op demands of its arguments; raises ValueError."""
    floats("slow", slow)
    aligned("fast", fast, slow)
    (slow_lr,) = numbers_of(numbers, (slow_lr,), slow)
    number("slow_lr", slow_lr, 0.0, 1.0)


SCHEMA = "(Tensor(a!)[] slow, Tensor(b!)[] fast, float slow_lr, Tensor? numbers=None) -> ()"


registry.define("interpolate_", SCHEMA, formula, check)


def interpolate_(
    slow: Sequence[Tensor], fast: Sequence[Tensor], slow_lr: float, *, numbers: Tensor | None = None
) -> None:
    """slow += slow_lr (fast - slow), then fast = slow, over two lists of equal shapes (paper:
    R-on's slow step).

    ``numbers``: fp64 [1] beside the tensors: slow_lr in place of the number, which a captured CUDA
    graph and torch.compile would keep as it was.
    """
    slow, fast = listed("slow", slow), listed("fast", fast)
    if not slow:
        return require(not fast, "fast", "0 tensors", len(fast))
    calls.over_lists(
        "interpolate_", {"slow": slow, "fast": fast}, slow_lr, numbers, changed=("slow", "fast")
    )
