"""Lists of tensors as tables of numbers, for the ``table`` overloads of the ops
(csrc/host/table.h says why).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from . import native

spare: list[
    Tensor
] = []  # tables that no call uses: to make one takes as long as a step on a few small tensors


def table_of(lists: Iterable[Sequence[Tensor]]) -> Tensor | None:
    """The lists as one table, a tenth of the time that handles take; it goes to ``spare`` when the
    op has read it.

    None where the dispatcher must see the tensors (under torch.compile, modes, transforms, for
    subclasses), and where native kernels want others: contiguous, and not fp64.
    """
    if _watched():
        return None
    whole = tuple(tensors if isinstance(tensors, list) else list(tensors) for tensors in lists)
    words = native.table_words(whole)
    table = spare.pop() if spare else None
    if table is None or table.shape[0] < words:
        table = torch.empty(words, dtype=torch.int64, device="cpu")
    if native.describe(table, whole) == native.BY_TABLE:
        return table
    spare.append(table)
    return None


def gather(
    params: list[Tensor], tables: dict[int, Tensor], index: int
) -> tuple[list[Tensor], list[Any], bool]:
    """Parameters and their gradients, for the ops of one step: looked at once, if all are there,
    plain and contiguous.

    The bool says whether they were. The lists are then good until other code may run, which could
    resize a tensor. ``tables[index]`` is kept for the next step.
    """
    if not _watched():
        table, words = tables.get(index), native.ROW_WORDS * len(params)
        if table is None or table.shape[1] != words:
            table = tables[index] = torch.zeros((2, words), dtype=torch.int64, device="cpu")
        found = native.gather(params, table.unbind())
        if found is not None:
            return *found, True
    return params, [p.grad for p in params], False


def _watched() -> bool:
    """Whether torch.compile, a mode or a transform looks at every call, and at what it is called
    with.
    """
    modes = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return modes or peek_interpreter_stack() is not None
