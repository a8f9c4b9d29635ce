"""How much of a mask is the noise that its Fishers were drawn with."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import by_keyword, warn
from ..tasks import Task
from .fisher import estimate_mask
from .mask import SaliencyMask

__all__ = ["noise_overlap", "overlap"]

LEAST = 0.5


def overlap(first: SaliencyMask, second: SaliencyMask) -> float:
    """The share of weights selected by both among those selected by either (Jaccard); 1 of two
    that select nothing.

    Raises:
        ValueError: they are of models of other names or shapes.
    """
    both = either = 0
    for name in first:
        a, b = first.to_bool(name), second.to_bool(name)
        both += int((a & b).sum())
        either += int((a | b).sum())
    return both / either if either else 1.0


@by_keyword
def noise_overlap(
    model: nn.Module,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    task: Task,
    draws: int = 8,
    threshold: float = 1.0,
    **settings: Any,
) -> float:
    """``overlap`` of two masks that differ in what the task draws alone: noise, timesteps.

    It costs two ``estimate_mask``, whose arguments these are; run it once for a kind of model, to
    choose ``draws``.

    Raises:
        ValueError: as ``estimate_mask``, or a task that cannot draw anew.

    Warns:
        RuntimeWarning: it is below .5: the mask is more noise than model.
    """
    rest: dict[str, Any] = {
        "draws": draws,
        "threshold": threshold,
        "estimator": "sample",
        **settings,
    }
    made = (
        estimate_mask(model, forget=forget, retain=retain, task=t, **rest)
        for t in (task, task.reseeded())
    )
    found = overlap(*made)
    if found < LEAST:
        warn(
            f"two masks that differ in the noise drawn share {found:.2f} of what either selects;"
            f" raise draws ({draws})"
        )
    return found
