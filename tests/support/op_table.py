"""The table of ops: what tests/ops/test_every_op.py shows of every one.

An entry is a ``ListOp``, ``RowOp`` or ``Op`` in one of the files below; it needs no other mention.
Ops over a head are composed of others and have a suite of their own, test_every_head.py.
"""

import linear_row_ops
import list_ops
import over_ops
import row_ops
import sample_ops
import step_ops
from op_entries import ListOp, Op, RowOp


def entries_of(kind, *modules) -> dict:
    found = [e for module in modules for e in vars(module).values() if type(e) is kind]
    return {entry.name: entry for entry in found}


LISTS: dict[str, ListOp] = entries_of(ListOp, list_ops, step_ops)
ROWS: dict[str, RowOp] = entries_of(RowOp, row_ops)
OPS: dict[str, Op] = {**LISTS, **ROWS, **entries_of(Op, over_ops, sample_ops, linear_row_ops)}
