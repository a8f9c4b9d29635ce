"""How the public calls over lists of tensors reach their op, and the one place that decides it.

- plain: every tensor is contiguous and none is fp64. The lists go as one table of numbers
  (``tables.py``), written by a single look at each tensor.
- copies: a tensor is not contiguous, a shard of a DTensor, or something the table cannot hold (a
  subclass, a tensor that is compiled or transformed). The op gets dense tensors, and what it wrote
  is copied back.
- fp64: as copies, and the reference kernel serves, as no other exists.

The optimizers are thin layers over these calls. A list argument that is ``None`` or empty means
"absent"; state, slow weights and masks may be flat lists (``lists.py``). Updated tensors must not
share memory. Of a DTensor the local shard is meant, and masks are then of shards. Raises ValueError
or RuntimeError, naming the argument, before anything is written.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import number, require
from . import registry, tables
from .arguments import strided
from .dtypes import only_reference
from .layout import in_memory, is_sharded, local

Lists = dict[str, Sequence[Tensor]]


class Call(NamedTuple):
    """What an op was called with."""

    op: Any  # the overload that takes a table; None if the lists did not go as one
    lists: Lists
    rest: tuple[Any, ...]
    scalars: dict[str, Any]
    result: Any


_noted = threading.local()


@contextmanager
def recorded(made: list[Call]) -> Iterator[None]:
    """Note in ``made`` what this thread calls meanwhile."""
    _noted.made = made
    try:
        yield
    finally:
        _noted.made = None


def over_lists(
    name: str, lists: Lists, *rest: Any, changed: tuple[str, ...] = (), **scalars: Any
) -> Any:
    """The op on ``lists`` (in the schema's order), ``rest`` and ``scalars``.

    ``changed`` names the written lists that may be part of a graph: autograd is told that their
    tensors have another version; an optimizer's state is in none.
    """
    counter = scalars.get("skipped")
    if isinstance(counter, Tensor) and not torch.compiler.is_compiling() and counter.is_neg():
        # torch's own remedy for a negated scalar fails beside arguments that are absent
        copy = in_memory(counter)
        scalars["skipped"] = copy
        result = over_lists(name, lists, *rest, changed=changed, **scalars)
        counter.copy_(copy)
        return result
    rest = tuple(in_memory(value) if type(value) is Tensor else value for value in rest)
    if type(scalars.get("numbers")) is Tensor:
        scalars["numbers"] = in_memory(scalars["numbers"])
    op = registry.described(name)
    # first: it brings the tensors into the cache faster than Python does
    table = tables.table_of(lists.values())
    if torch.is_grad_enabled():
        _refuse_leaves({key: lists[key] for key in op.written})
    given = lists
    if table is None and any(is_sharded(t) for tensors in lists.values() for t in tensors):
        lists = {key: [local(t) for t in tensors] for key, tensors in lists.items()}
        table = tables.table_of(lists.values())
    if table is None:
        result = _over_copies(name, lists, rest, scalars)
    else:
        result = op.table(table, *rest, **scalars)
        tables.spare.append(table)
    made = None if torch.compiler.is_compiling() else getattr(_noted, "made", None)
    if made is not None:
        by_table = op.table if table is not None and lists is given else None
        made.append(Call(by_table, lists, rest, scalars, result))
    _bump_versions(given, lists, changed)
    return result


def _over_copies(name: str, lists: Lists, rest: tuple[Any, ...], scalars: dict[str, Any]) -> Any:
    written = registry.described(name).written
    if not torch.compiler.is_compiling():  # guards on strides and identities would compile anew
        for key, tensors in lists.items():
            strided(key, tensors, key in written)
    dense = {key: [in_memory(t) for t in tensors] for key, tensors in lists.items()}
    double = any(only_reference(t.dtype) for tensors in dense.values() for t in tensors)
    kernel = registry.default_kernel(name) if double else registry.op(name)
    result = kernel(*dense.values(), *rest, **scalars)
    with torch.no_grad():
        for key in written:
            for target, copy in zip(lists[key], dense[key], strict=True):
                if copy is not target:
                    target.copy_(copy)
    return result


def _bump_versions(given: Lists, lists: Lists, changed: tuple[str, ...]) -> None:
    """Tell autograd what a kernel wrote behind its back; a DTensor counts its versions itself."""
    for key in changed:
        torch.autograd.graph.increment_version(lists[key])
        if lists is not given:
            torch.autograd.graph.increment_version(given[key])


def _refuse_leaves(lists: Lists) -> None:
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.is_leaf:
                raise RuntimeError(
                    f"{name}[{i}]: expected a call under torch.no_grad(), found a leaf that"
                    " requires grad; an in-place update of it cannot be differentiated"
                )


def learning_rate(lr: float) -> float:
    """The number; a comparison of it would break a compiled graph."""
    return float(lr) if torch.compiler.is_compiling() else number("lr", lr, 0.0)


def check_clip(norm: Any, max_norm: float) -> None:
    """A clip needs a norm: without one the step would not be clipped, and nobody would know."""
    if torch.compiler.is_compiling():
        return
    remedy = "pass what masked_grad_norm returns"
    there = norm is None or isinstance(norm, Tensor)
    require(there, "norm", "a tensor", type(norm).__name__, remedy)
    clips = norm is None and max_norm != math.inf
    require(not clips, "norm", "a tensor, with max_norm", "None", remedy)
