"""Which mask belongs to which parameter, however the model is wrapped."""

from collections.abc import Container

from torch import nn

from ..models.names import possible_names


def entries_of(names: list[str], known: Container[str]) -> dict[str, str]:
    """The known name for each parameter that has one; where two would share one, it is the nearer
    name's.
    """
    found: dict[str, tuple[int, str]] = {}
    for name in names:
        for distance, possible in enumerate(possible_names(name)):
            if possible in known:
                found[possible] = min(found.get(possible, (distance, name)), (distance, name))
                break
    return {name: entry for entry, (_, name) in found.items()}


def check_matched(
    named: list[tuple[str, nn.Parameter]], missing: list[str], known: list[str]
) -> None:
    """Raise ValueError if there are parameters whose mask is missing."""
    if not missing:
        return
    remedy = (
        "build it on this model as it is trained, adapters included, or put unmasked parameters in"
        " a group with masked=False"
    )
    if not any(p.requires_grad for n, p in named if n in missing):
        remedy = "they are frozen: pass only parameters with requires_grad"
    raise ValueError(
        f"saliency: expected a mask for each of {len(named)} parameters, found none for"
        f" {len(missing)} ({_some(missing)}); the mask is for {len(known)} ({_some(known)});"
        f" {remedy}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
