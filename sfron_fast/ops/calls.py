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
    """What an op was called with, in a table."""

    op: Any  # the overload that takes one
    lists: Lists
    rest: tuple[Any, ...]
    scalars: dict[str, Any]
    result: Any


_noted: dict[int, list[Call]] = {}  # by thread


@contextmanager
def recorded(made: list[Call]) -> Iterator[None]:
    """Note in ``made`` what this thread calls meanwhile with lists that go as a table."""
    thread = threading.get_ident()
    _noted[thread] = made
    try:
        yield
    finally:
        _noted.pop(thread, None)


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
    for value in rest:
        if type(value) is Tensor:
            rest = tuple(in_memory(v) if type(v) is Tensor else v for v in rest)
            break
    if type(scalars.get("numbers")) is Tensor:
        scalars["numbers"] = in_memory(scalars["numbers"])
    op = registry.described(name)
    # first: it brings the tensors into the cache faster than Python does
    table = tables.table_of(lists.values())
    if torch.is_grad_enabled():
        _refuse_leaves(lists, op.written)
    given = lists
    if table is None and any(is_sharded(t) for tensors in lists.values() for t in tensors):
        lists = {key: [local(t) for t in tensors] for key, tensors in lists.items()}
        table = tables.table_of(lists.values())
    if table is None:
        result = _over_copies(name, lists, rest, scalars)
    else:
        result = op.table(table, *rest, **scalars)
        tables.spare.append(table)
        if _noted and lists is given:
            made = _noted.get(threading.get_ident(), [])
            made.append(Call(op.table, lists, rest, scalars, result))
    for key in changed:  # autograd is told what a kernel wrote behind its back
        torch.autograd.graph.increment_version(lists[key])
        if lists is not given:  # a DTensor counts its versions itself
            torch.autograd.graph.increment_version(given[key])
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


def _refuse_leaves(lists: Lists, written: tuple[str, ...]) -> None:
    for name in written:
        for i, tensor in enumerate(lists[name]):
            if getattr(tensor, "requires_grad", False) and tensor.is_leaf:
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
