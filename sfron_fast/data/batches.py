"""Batches (inputs, targets): checked, moved to a device, given to a model; the same for every pass
over data.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import require


def check_model(model: nn.Module) -> None:
    """Raise ValueError for what is no model: a class, a state dict, a loader."""
    kind = type(model).__name__
    require(isinstance(model, nn.Module), "model", "a torch.nn.Module", f"a {kind}")


def check_loader(loader: Any, name: str) -> None:
    """Raise ValueError for what cannot be iterated."""
    there = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    require(there, name, "batches", type(loader).__name__, "pass a DataLoader or a list of batches")


def check_again(loader: Any, name: str) -> None:
    """Raise ValueError for what can be read once, as a generator."""
    check_loader(loader, name)
    remedy = "pass a DataLoader, a list, or an object whose __iter__ begins a new pass"
    found = f"a {type(loader).__name__}, which can be read once"
    wanted = "batches that can be read again and again"
    require(not isinstance(loader, Iterator), name, wanted, found, remedy)


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter, else of the first buffer, else the CPU.

    Raises:
        ValueError: it is no model.
    """
    check_model(model)
    return next(model.parameters(), next(model.buffers(), torch.empty(0))).device


def each_tensor(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of ``value`` with ``change(t)`` in place of every tensor t in it, and of whatever else
    has ``to(device)``.

    Looks into mappings, tuples (named ones too), lists and dataclasses, nested; keeps their types
    and all else in them.
    """
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = each_tensor(item, change)
        return changed
    if isinstance(value, Mapping):
        return {key: each_tensor(item, change) for key, item in value.items()}
    if hasattr(value, "to"):  # before tuples: a PackedSequence is both
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [each_tensor(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            # frozen ones too
            object.__setattr__(record, field.name, each_tensor(getattr(value, field.name), change))
        return record
    return value


def tensors_in(value: Any) -> list[Any]:
    """What ``each_tensor`` would change, in its order."""
    found: list[Any] = []
    each_tensor(value, found.append)
    return found


def move_tensors(value: Any, device: torch.device) -> Any:
    """A copy of ``value`` with all tensors in it on ``device``, whatever nest it is."""
    inference = torch.is_inference_mode_enabled()

    def there(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item.to(device)
        moved = item.to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() and not inference else moved

    return each_tensor(value, there)


def move(batch: Any, device: torch.device, name: str = "loader") -> tuple[Any, Tensor]:
    """(inputs, targets) of the loader called ``name``, on ``device``: tensors, or nests of them
    (``each_tensor``).

    Raises:
        ValueError: no such pair, inputs without a tensor, targets that are no tensor [samples,
            ...].
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    remedy = "change collate_fn; of a single batch pass [(inputs, targets)]"
    require(pair, name, "batches (inputs, targets)", type(batch).__name__, remedy)
    inputs, targets = batch
    require(bool(tensors_in(inputs)), name, "inputs with a tensor in them", type(inputs).__name__)
    remedy = "pass batches: DataLoader(data_set, batch_size) of a data set"
    require(targets.dim() > 0, name, "targets [samples, ...]", "one number", remedy)
    return move_tensors(inputs, device), move_tensors(targets, device)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model gets its inputs: a mapping by keyword, ``model(**inputs)``; all else as one
    argument.
    """
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output for ``inputs`` of a batch."""
    positional, named = arguments(inputs)
    return model(*positional, **named)


def progress_bar(steps: Iterable[Any], sized: Any, title: str, show: bool | None) -> Iterable[Any]:
    """``steps``, with a tqdm bar if ``show`` and tqdm is installed; None = where stderr, which it
    is drawn on, is a terminal.
    """
    if not (sys.stderr.isatty() if show is None and sys.stderr is not None else show):
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(
        steps, desc=title, total=len(sized) if hasattr(sized, "__len__") else None, leave=False
    )
