"""Parameters without a gradient in the first or the last step of a cycle: their slow weights."""

from torch import Tensor

from .. import functional
from ..ops.interpolate import lerp
from ..ops.layout import local
from ..ops.split_weights import join, split
from .batch import Batch
from .elsewhere import brought, is_away, keep
from .scalars import NAMES, on_device
from .state import StatefulOptimizer


def start_idle(optimizer: StatefulOptimizer, batch: Batch) -> None:
    """Their cycle starts here, too: they may still move in its retain steps."""
    if is_away(batch):
        return keep(optimizer, batch)
    optimizer._slow(batch)
    optimizer._slow_corrections(batch)
    for param in batch.params:
        state = optimizer.state[param]
        state["slow"].copy_(param)
        if "slow_correction" in state:
            state["slow_correction"].copy_(state["correction"])


def blend_idle(optimizer: StatefulOptimizer, batch: Batch) -> None:
    """Their cycle ends here: no gradient in its last step, but maybe one in an earlier one."""
    slow_lr = batch.group["slow_lr"]
    numbers = on_device({"slow_lr": slow_lr}, batch.params[0].device)
    for part, slow, corrections in brought(optimizer, batch):
        if corrections:
            for param, *pieces in zip(part.params, slow, corrections, strict=True):
                _blend_pieces(optimizer, param, pieces, float(slow_lr))
            continue
        alpha = slow_lr if numbers is None else NAMES["slow_lr"]
        functional.interpolate_(slow, part.params, alpha, numbers=numbers)
    if is_away(batch):
        keep(optimizer, batch)


def _blend_pieces(
    optimizer: StatefulOptimizer, param: Tensor, held: list[Tensor], slow_lr: float
) -> None:
    """Weights in two pieces, rounded as the step after the last would round them."""
    state = optimizer.state[param]
    pieces = [(param, state["correction"]), held]
    # a negated view has its bits with the other sign
    fast, slow = (join(local(w).resolve_neg(), local(correction)) for w, correction in pieces)
    step = int(state["step"]) + 1 if state.get("step") is not None else 0
    new = split(lerp(slow, fast, slow_lr), step, state["correction"].dtype)
    for piece in pieces:
        for target, value in zip(piece, new, strict=True):
            local(target).copy_(value)
