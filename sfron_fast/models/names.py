"""How a parameter is called, whatever wraps the model, and a digest of all of them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations

import torch
from torch import nn

from ..distributed.shards import whole

# no model calls its own so
_WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)
_PEFT = "base_model.model"
_PERHAPS = ("module", "base_layer", _PEFT)  # put in by DataParallel or PEFT, or the model's own
_FEW = 6  # of them in a name; of more, all or none are taken for a wrapper's


def canonical_name(name: str) -> str:
    """A parameter's name without what DataParallel, DDP, torch.compile, checkpointing, FSDP or PEFT
    put into it.
    """
    units = _units(name)
    return ".".join([*(unit for unit in units[:-1] if unit not in _PERHAPS), units[-1]])


def canonical_names(names: Iterable[str]) -> list[str]:
    """The canonical names of a model's parameters, in order.

    Where two would then be the same, both keep their ``module`` and ``base_layer``, less what wraps
    the whole model.
    """
    names = list(names)
    short, units = [canonical_name(name) for name in names], [_units(name) for name in names]
    while (
        units and units[0][0] in _PERHAPS and all(u[0] == units[0][0] and len(u) > 1 for u in units)
    ):
        units = [u[1:] for u in units]
    count = Counter(short)
    return [s if count[s] == 1 else ".".join(u) for s, u in zip(short, units, strict=True)]


def possible_names(name: str) -> Iterator[str]:
    """What a parameter may be called where nothing, or less, wraps the model: its full name first,
    the canonical last.

    Of what a model may have named itself, less is left out before more, and the outer before the
    inner.
    """
    units = _units(name)
    perhaps = [i for i, unit in enumerate(units[:-1]) if unit in _PERHAPS]
    for count in range(len(perhaps) + 1) if len(perhaps) <= _FEW else (0, len(perhaps)):
        for gone in combinations(perhaps, count):
            yield ".".join(unit for i, unit in enumerate(units) if i not in gone)


def _units(name: str) -> list[str]:
    """The parts of a name but those that are a wrapper's for certain; PEFT's two at its beginning
    are one.
    """
    *parts, last = [part for part in name.split(".") if part not in _WRAPPERS] or [name]
    first = next((i for i, part in enumerate(parts) if part not in _PERHAPS), len(parts))
    if ".".join(parts[first : first + 2]) == _PEFT:
        parts[first : first + 2] = [_PEFT]
    return [*parts, last]


def model_digest(model: nn.Module) -> str:
    """sha256 over the names, shapes, dtypes and values of a model's parameters."""
    sha = hashlib.sha256()
    for name, p in model.named_parameters():
        sha.update(f"{canonical_name(name)}{list(p.shape)}{p.dtype}".encode())
        sha.update(
            whole(p.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return sha.hexdigest()
