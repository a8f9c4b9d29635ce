"""Which weights two Fishers select: what makes them comparable, and the largest ratios."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..ops import reference
from ..ops.layout import local
from .cuts import check_cuts


def checked_fishers(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> list[str]:
    """The names, in order, of two Fishers that can be compared; see ``SaliencyMask.from_fisher``
    for the errors.
    """
    require(bool(forget), "forget", "at least one tensor", "an empty mapping")
    require(
        forget.keys() == retain.keys(),
        "retain",
        f"the names of forget ({len(forget)})",
        f"{len(retain)} names, {len(forget.keys() ^ retain.keys())} of them different",
    )
    for side, fisher in (("forget", forget), ("retain", retain)):
        for name, f in fisher.items():
            sound = bool(torch.isfinite(f).all()) and bool((f >= 0).all())
            require(
                sound,
                f"{side}[{name!r}]",
                "finite values >= 0",
                "others",
                "check the loss and the data",
            )
            shape = tuple(forget[name].shape)
            require(tuple(f.shape) == shape, f"{side}[{name!r}]", f"shape {shape}", tuple(f.shape))
    estimators = [getattr(f, "metadata", {}).get("estimator") for f in (forget, retain)]
    require(
        estimators[0] == estimators[1],
        "retain",
        f"estimator {estimators[0]!r} as forget",
        repr(estimators[1]),
        "a threshold compares like with like",
    )
    check_cuts(getattr(forget, "metadata", {}), getattr(retain, "metadata", {}))
    return list(forget)


def no_gradient(*fishers: Mapping[str, Tensor]) -> set[str]:
    """Parameters without gradient in every one of the Fishers."""
    return set.intersection(
        *(set(getattr(f, "metadata", {}).get("no_gradient", ())) for f in fishers)
    )


def without_gradient(bits: dict[str, Tensor], *fishers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed bits, none of them set where no Fisher has a gradient."""
    gone = no_gradient(*fishers)
    return {n: torch.zeros_like(b) if n in gone else b for n, b in bits.items()}


def without_zeros(packed: list[Tensor], forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
    """Packed bits, none of them set where both Fishers are exactly 0; of DTensors the shards'."""
    kept = []
    for bits, f, r in zip(packed, forget, retain, strict=True):
        zeros = (local(f) == 0) & (local(r) == 0)
        if bool(zeros.any()):  # to pack takes memory, and most tensors have none
            bits = bits & ~reference.pack_bits(zeros)
        kept.append(bits)
    return kept


def provenance(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Any]:
    """How two Fishers were made, and by which versions."""
    sides = {
        side: getattr(f, "metadata", {}) for side, f in (("forget", forget), ("retain", retain))
    }
    return {**sides, "versions": versions()}


def versions() -> dict[str, str]:
    """Of what makes a mask."""
    from ..version import __version__

    return {"sfron_fast": __version__, "torch": torch.__version__}


def largest(values: Tensor, fraction: float) -> Tensor:
    """bool: the round(fraction n) largest values; ties go to the lower index."""
    k = round(fraction * values.numel())
    if k == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    kth = values.kthvalue(values.numel() - k + 1).values
    above = values > kth
    ties = values == kth
    return above | (ties & (ties.cumsum(0) <= k - above.sum()))
