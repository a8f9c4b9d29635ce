"""Which weights matter more to forgetting than to what is retained: docs/equations.md, 3."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import number, require
from . import calls, registry
from .arguments import aligned
from .bits import pack_bits
from .lists import listed, spread

FISHER_EPS = 1e-15  # the authors' epsilon in the saliency ratio


def formula(
    forget: Sequence[Tensor], retain: Sequence[Tensor], threshold: float, eps: float
) -> tuple[list[Tensor], Tensor]:
    """F_forget + eps >= gamma (F_retain + eps), packed; and how many weights each tensor selects,
    int64 [tensors].
    """
    retain = spread(retain, forget)
    selected = [f + eps >= (r + eps) * threshold for f, r in zip(forget, retain, strict=True)]
    device = forget[0].device if forget else torch.device("cpu")
    counts = torch.zeros(len(selected), dtype=torch.int64, device=device)
    for i, s in enumerate(selected):
        counts[i] = s.sum()
    return [pack_bits(s) for s in selected], counts


def check(forget: Sequence[Tensor], retain: Sequence[Tensor], threshold: float, eps: float) -> None:
    """What the op demands of its arguments; raises ValueError."""
    for i, f in enumerate(forget):
        ok = f.dtype in (torch.float32, torch.float64)
        require(ok, f"forget[{i}]", "float32 or float64", f.dtype)
    aligned("retain", retain, forget)
    number("threshold", threshold, 0.0, open_low=True)
    number("eps", eps, 0.0)


SCHEMA = "(Tensor[] forget, Tensor[] retain, float threshold, float eps) -> (Tensor[], Tensor)"


def fake(
    forget: Sequence[Tensor], retain: Sequence[Tensor], threshold: float, eps: float
) -> tuple[list[Tensor], Tensor]:
    """Empty outputs, for torch.compile."""
    device = forget[0].device if forget else torch.device("cpu")
    packed = [f.new_empty((f.numel() + 7) // 8, dtype=torch.uint8) for f in forget]
    return packed, torch.empty(len(forget), dtype=torch.int64, device=device)


registry.define("saliency_mask", SCHEMA, formula, check, fake=fake)


def saliency_mask(
    forget: Sequence[Tensor], retain: Sequence[Tensor], threshold: float, eps: float = FISHER_EPS
) -> tuple[list[Tensor], Tensor]:
    """1[F_forget + eps >= threshold (F_retain + eps)], packed uint8 per tensor, and the counts
    int64 [tensors].
    """
    forget, retain = listed("forget", forget), listed("retain", retain)
    if not forget:
        require(not retain, "retain", "0 tensors", len(retain))
        return [], torch.zeros(0, dtype=torch.int64)
    return calls.over_lists("saliency_mask", {"forget": forget, "retain": retain}, threshold, eps)
