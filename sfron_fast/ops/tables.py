"""Lists of tensors as tables of numbers, for the ``table`` overloads of the ops
(csrc/host/table.h says why).
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from . import native
from .native import Tabled

spare: list[
    Tensor
] = []  # tables that no call uses: to make one takes as long as a step on a few small tensors


def table_of(lists: Collection[Sequence[Tensor]]) -> Tensor | None:
    """The lists as one table, a tenth of the time that handles take; it goes to ``spare`` when the
    op has read it.

    None where the dispatcher must see the tensors (under torch.compile, modes, transforms, for
    subclasses), and where native kernels want others: contiguous, and not fp64.
    """
    if watched():
        return None
    whole = tuple(
        [t.table if type(t) is Tabled else t if type(t) is list else list(t) for t in lists]
    )
    table = spare.pop() if spare else torch.empty(0, dtype=torch.int64, device="cpu")
    try:
        served = native.describe(table, whole)
    except ValueError:  # it is too short
        words = native.table_words(tuple(lists))
        table = torch.empty(words, dtype=torch.int64, device="cpu")
        served = native.describe(table, whole)
    if served == native.BY_TABLE:
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
    if not watched():
        table, words = tables.get(index), native.ROW_WORDS * len(params)
        if table is None or table.shape[1] != words:
            table = tables[index] = torch.zeros((2, words), dtype=torch.int64, device="cpu")
        rows = table.unbind()
        grads = native.gather(params, rows)
        if grads is not None:
            return Tabled(params, rows[0]), Tabled(grads, rows[1]), True
    return params, [p.grad for p in params], False


def watched() -> bool:
    """Whether torch.compile, a mode or a transform looks at every call, and at what it is called
    with.
    """
    modes = torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return modes or peek_interpreter_stack() is not None
