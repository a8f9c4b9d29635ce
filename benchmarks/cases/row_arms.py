"""What the arms of the row cases share: weights in plain torch, gradients, how many inputs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TEMPERATURE, FLOOR = 0.5, 1e-6
ROTATED = 1 << 27  # bytes of inputs that one arm goes through
BF16, FP32 = torch.bfloat16, torch.float32


def copies(size: int) -> int:
    return max(1, min(64, ROTATED // max(size, 1)))


def weighted(losses: Tensor, cap: float = math.inf) -> Tensor:
    """Equations 4 and 5 of docs/equations.md in plain torch."""
    known = losses.detach()
    raw = known.clamp_min(FLOOR).pow(-TEMPERATURE)
    weights = raw / raw.sum()
    if cap != math.inf:
        weights = weights.masked_fill(known >= cap, 0.0)
    return (weights * losses).sum()


def compiled(function: Callable[..., Tensor], tiny: bool) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, backend="aot_eager" if tiny else "inductor")


def differentiated(
    function: Callable[..., Tensor],
) -> Callable[[tuple[Tensor, Tensor]], list[Tensor]]:
    def step(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
        pair[0].grad = None
        function(*pair).backward()
        return [pair[0].grad]

    return step


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


class _Result(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def as_result(buffer: Tensor) -> Tensor:
    """``buffer`` as an operation's result, which may be written over, without the operation."""
    return _Result.apply(torch.zeros((), device=buffer.device, requires_grad=True), buffer)
