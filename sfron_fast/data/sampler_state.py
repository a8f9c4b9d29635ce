"""What a loader and its samplers keep from pass to pass: generators, counters, orders that are
shuffled in place.

A pass is found again by putting these back. What hides elsewhere (in a closure, in a library) is
not seen here; ``EndlessLoader`` notices it by the batches.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import require

GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
)
PLAIN = (bool, int, float, str, type(None))
# of DataLoader itself: nothing in them counts passes
SETTINGS = frozenset(vars(DataLoader(Dataset())))


def _owners(loader: Any) -> dict[str, Any]:
    """Path -> the loader, one that it wraps, its samplers and the samplers within them, its data
    set and those within it.
    """
    found: dict[str, Any] = {}
    waiting = [("loader", loader)]
    while waiting:
        path, owner = waiting.pop()
        if any(owner is other for other in found.values()):
            continue
        found[path] = owner
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, (Sampler, Dataset, DataLoader)) or name in (
                "sampler",
                "batch_sampler",
                "dataset",
            ):
                waiting.append((f"{path}.{name}", value))
    return found


def _kept(owner: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of one owner that can change from pass to pass."""
    torchs = type(owner).__module__.startswith("torch.utils.data")
    for name, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, GENERATORS):
            yield name, value
        elif name != "epoch" and (torchs or isinstance(owner, Dataset) or name in SETTINGS):
            continue
        elif type(value) in PLAIN or _is_order(value):
            yield name, value


def _is_order(value: Any) -> bool:
    """Integers in a row, as a sampler holds what it shuffles in place."""
    if isinstance(value, list):
        return all(type(item) is int for item in value)
    if isinstance(value, Tensor):
        return value.dim() == 1 and not value.is_floating_point() and not value.is_complex()
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"


def sampler_state(loader: Any) -> dict[str, Any]:
    """Path -> state, in types that ``weights_only`` loading accepts."""
    owners = _owners(loader)
    return {
        f"{path}.{name}": _read(value)
        for path, owner in owners.items()
        for name, value in _kept(owner)
    }


def set_sampler_state(loader: Any, state: dict[str, Any], argument: str) -> None:
    """Put back what ``sampler_state`` returned, in place; ``argument`` names the loader in the
    error.

    Raises:
        ValueError: a generator or an order that this loader does not have.
    """
    owners = _owners(loader)
    live = {
        f"{path}.{name}": value for path, owner in owners.items() for name, value in _kept(owner)
    }
    lost = [
        path
        for path, saved in state.items()
        if path.rpartition(".")[0] not in owners or (path not in live and type(saved) not in PLAIN)
    ]
    fresh = [path for path, value in live.items() if path not in state and type(value) not in PLAIN]
    require(
        not lost and not fresh,
        argument,
        f"the generators the run began with ({sorted(state)})",
        sorted(live),
        "resume with the same kind of loader",
    )
    for path, saved in state.items():
        owner, _, name = path.rpartition(".")
        value = live.get(path)
        if type(saved) in PLAIN:
            if type(value) is not type(saved) or value != saved:
                setattr(owners[owner], name, saved)
        else:
            _write(value, saved)


def _read(value: Any) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        version, internal, gauss = value.getstate()
        return [version, list(internal), gauss]
    if isinstance(value, np.random.RandomState):
        return _portable(value.get_state(legacy=False))
    if isinstance(value, np.random.Generator):
        return _portable(value.bit_generator.state)
    if isinstance(value, np.random.BitGenerator):
        return _portable(value.state)
    return torch.as_tensor(value).to("cpu", copy=True)


def _write(value: Any, saved: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(saved)
    elif isinstance(value, random.Random):
        version, internal, gauss = saved
        value.setstate((version, tuple(internal), gauss))
    elif isinstance(value, np.random.RandomState):
        value.set_state(_native(saved))
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = _native(saved)
    elif isinstance(value, np.random.BitGenerator):
        value.state = _native(saved)
    elif isinstance(value, list):
        value[:] = saved.tolist()
    else:
        value[...] = saved if isinstance(value, Tensor) else saved.numpy()


def _portable(state: Any) -> Any:
    """numpy's nested state with its arrays as lists."""
    if isinstance(state, dict):
        return {key: _portable(item) for key, item in state.items()}
    if isinstance(state, np.ndarray):
        return [str(state.dtype), state.tolist()]
    return state.item() if isinstance(state, np.generic) else state


def _native(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _native(item) for key, item in state.items()}
    return np.array(state[1], dtype=state[0]) if isinstance(state, list) else state
