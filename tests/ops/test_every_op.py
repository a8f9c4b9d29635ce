"""What every op must show, over the table of ops in tests/support/op_table.py.

What is special to one op lies in the file of its name; flat lists in test_flat_ops.py, random cases
in test_fuzz.py.
"""

from itertools import product

import pytest
import torch
from cases import LAYOUT_SHAPES, LAYOUTS, MIXED, shifted
from judging import (
    assert_deterministic,
    assert_neighbours_untouched,
    assert_noncontiguous_is_right_or_refused,
    assert_opcheck,
    assert_same_bits,
    assert_same_case,
    assert_same_lists,
    compiled_equals_eager,
    entries,
    flat_outputs,
    formula_of,
    named,
)
from op_entries import ListOp
from op_table import LISTS, OPS, ROWS
from spoiling import assert_rejected

from sfron_fast.ops import registry


def parameters(names, rows):
    """A parametrisation by (id, values)."""
    return pytest.mark.parametrize(names, [pytest.param(*row, id=name) for name, row in rows])


def each_op(table):
    return parameters(("op",), [(name, (op,)) for name, op in table.items()])


def each_dtype(table, kernels=False):
    """Ops and their dtypes; with ``kernels`` only those that native kernels take."""
    return parameters(
        ("op", "dtype"),
        [
            (f"{name}-{dtype}", (op, dtype))
            for name, op in table.items()
            for dtype in op.dtypes
            if not (kernels and dtype == torch.float64)
        ],
    )


NUMBERED = {name: op for name, op in LISTS.items() if op.numbers}


def test_the_table_holds_every_op():
    gradients = {op.gradient_name for op in ROWS.values()}
    assert set(OPS) | gradients == set(registry.SCHEMAS)
    for op in OPS.values():
        assert set(op.thorough) <= set(op.settings)


# --- results --------------------------------------------------------------------------------------


@pytest.mark.checklist("B9")
@parameters(
    ("op", "name", "dtype"),
    [
        (f"{op}-{name}-{dtype}", (op, name, dtype))
        for op in OPS.values()
        for name in op.settings
        for dtype in op.dtypes
    ],
)
def test_formula(device, op, name, dtype):
    """The bits of the formula, or within the bounds of an exact result."""
    for case in op.examples(name, dtype, device):
        op.assert_right(case)


@parameters(
    ("op", "size", "dtype"),
    [
        (f"{op}-{size}-{dtype}", (op, size, dtype))
        for op in (LISTS | ROWS).values()
        for size in op.sizes
        for dtype in op.dtypes
        if size != "many" or op.name in ROWS or dtype == torch.float32
    ],
)
def test_sizes(device, op, size, dtype):
    """Empty, odd, around a tile, many; of lists also where no tensor is aligned."""
    op.assert_size(size, dtype, device)


@each_op(LISTS)
def test_no_tensors(device, op):
    case = op.make([], torch.float32, device)
    wanted = case.run(formula_of(op.name))
    got = case.run(op.call)
    assert_same_lists(named(flat_outputs(got)), named(flat_outputs(wanted)))


@each_dtype(LISTS)
def test_neighbours_in_memory_stay(device, op, dtype):
    """What lies before and after a tensor in its storage."""
    for case in op.full([(1,), (65,), (33, 31)], dtype, device):
        misaligned = case.map(shifted)
        misaligned.run(op.call)
        assert_neighbours_untouched(misaligned)


@each_dtype(OPS, kernels=True)
def test_only_what_the_schema_names_is_written(device, op, dtype):
    written = {a.name for a in schema_of(op.name).arguments if a.is_write}
    kernels = [registry.op(op.name), *(call for _, call in op.calls)]
    for kernel, case in product(kernels, op.full(op.opcheck_shapes[0], dtype, device)):
        before, versions = case.clone(), [t._version for _, t in case.flat()]
        case.run(kernel)
        for (name, now), (_, then), version in zip(
            case.flat(), before.flat(), versions, strict=True
        ):
            if name.split("[")[0] not in written:
                assert_same_bits(now, then, name)
                assert now._version == version, name


def schema_of(name):
    return getattr(torch.ops.sfron_fast, name).default._schema


@parameters(
    ("op", "layout", "dtype"),
    [
        (f"{op}-{layout}-{dtype}", (op, layout, dtype))
        for op in (LISTS | ROWS).values()
        for layout in (*LAYOUTS, "misaligned")
        for dtype in op.dtypes
    ],
)
def test_layouts(device, op, layout, dtype):
    """The public call gives the same bits however its tensors lie in memory."""
    shapes = [LAYOUT_SHAPES] if isinstance(op, ListOp) else [s for s in op.sizes["odd"]]
    lay = {**LAYOUTS, "misaligned": shifted}[layout]
    for shape in shapes:
        for case in op.full(shape, dtype, device):
            wanted = op.public_outcome(case.clone())
            # masks are flat bytes
            laid = case.map(lambda t: t if t.dtype == torch.uint8 else lay(t))
            assert_same_lists(op.public_outcome(laid), wanted)


@each_dtype(OPS, kernels=True)
def test_strides_are_read_right_or_refused(device, op, dtype):
    """By the op itself, past the public call."""
    shape = LAYOUT_SHAPES if isinstance(op, ListOp) else op.opcheck_shapes[0]
    for case in op.full(shape, dtype, device):
        assert_noncontiguous_is_right_or_refused(op.name, case)


@pytest.mark.checklist("B7")
@each_dtype(OPS)
def test_deterministic(device, op, dtype, set_threads):
    """The same bits again, and with another number of threads."""
    native = dtype != torch.float64 and registry.kernel_for(op.name, device) == "native"
    for case in op.full(op.shape_for_threads, dtype, device):
        assert_deterministic(case, op.outcome, set_threads if native else None)


@each_dtype(NUMBERED)
def test_a_tensor_stands_for_the_numbers(device, op, dtype):
    for name in op.thorough:
        case = op.make(MIXED, dtype, device, **op.settings[name])
        other = case.clone()
        values = [case.scalars[name] for name in op.numbers]
        other.tensors["numbers"] = torch.tensor(values, dtype=torch.float64, device=device)
        other.scalars |= dict.fromkeys(op.numbers, 0.2)
        op.assert_right(other)
        case.run(op.call)
        other.tensors["numbers"] = case.tensors.setdefault("numbers", None)
        assert_same_case(other, case)


# --- torch's contracts ----------------------------------------------------------------------------


@pytest.mark.checklist("E2")
@each_dtype(OPS, kernels=True)
def test_opcheck(device, op, dtype):
    """Schema, fake, autograd registration, dynamic shapes."""
    for name, case in op.opchecks(dtype, device):
        assert_opcheck(name, case)


@each_op(OPS)
def test_compile(device, op):
    """One compilation for cases of equal shapes, and the bits of eager."""
    cases = [op.full(op.compile_shape, torch.float32, device)[-1] for _ in range(3)]
    assert compiled_equals_eager(registry.op(op.name), cases) == 1
    if op.name in LISTS:
        assert compiled_equals_eager(op.call, cases) == 1


@each_op(ROWS)
def test_compile_the_public_loss(device, op):
    case = op.full(op.compile_shape, torch.float32, device)[-1]
    source, *others = case.tensors.values()
    compiled = torch.compile(op.loss, fullgraph=True, backend="aot_eager")
    eager, other = (source.clone().requires_grad_() for _ in range(2))
    for loss, leaf in ((op.loss, eager), (compiled, other)):
        (loss(leaf, *others, *case.scalars.values()) * -2.0).backward()
    assert torch.equal(eager.grad, other.grad)


@each_op(NUMBERED)
def test_compile_changing_numbers(device, op):
    """Numbers that change go in through ``numbers``: one compilation.

    (Of Python floats torch guards the value.)
    """
    cases = [
        op.make(device=device, numbers=[0.08 * (i + 1) / (j + 1) for j in range(len(op.numbers))])
        for i in range(12)
    ]
    for kernel in (registry.op(op.name), op.call):
        assert compiled_equals_eager(kernel, cases) == 1


@parameters(
    ("op", "name"),
    [
        (f"{op}-{name}", (op, name))
        for op in LISTS.values()
        for name in registry.described(op.name).written
        if "corrections" not in name  # integers
    ],
)
def test_a_leaf_is_refused_and_versions_are_counted(device, op, name):
    """With gradients enabled eager torch refuses to update a leaf in place, and so does the call;
    without, autograd notices the update of what may be part of a graph. State is in none.
    """
    settings = op.settings[op.thorough[0 if name == "scales" else -1]]
    case = op.make([(3, 32)], torch.float32, device, **settings)
    leaf = case.tensors[name][0].abs().requires_grad_()
    case.tensors[name] = [leaf]
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="no_grad"):
        case.run(op.call)
    assert torch.equal(leaf.detach(), before)
    if name not in op.in_graph:
        return
    loss = (leaf * leaf).sum()
    with torch.no_grad():
        case.run(op.call)
    assert not torch.equal(leaf.detach(), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@parameters(
    ("op", "name"),
    [(f"{op}-{name}", (op, name)) for op in ROWS.values() for name in op.read_again],
)
def test_a_change_between_forward_and_backward_is_noticed(op, name):
    """Nothing is written; what backward reads again must be what forward read."""
    case = op.full(op.compile_shape)[-1]
    leaf = next(iter(case.tensors))
    source = case.tensors[leaf].requires_grad_()
    case.tensors[leaf] = source * 1.0
    versions = [t._version for _, t in case.flat()]
    loss = op.loss(*case.tensors.values(), *case.scalars.values())
    assert [t._version for _, t in case.flat()] == versions
    with torch.no_grad():
        case.tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- refusals -------------------------------------------------------------------------------------


@parameters(
    ("op", "edit", "argument"),
    [(f"{op}-{i}", (op, edit, argument)) for op in OPS.values() for i, edit, argument in op.wrong],
)
def test_rejects(op, edit, argument):
    """By the op, its checked formula and the public call; nothing is written."""
    for label, kernel in [*entries(op.name), *op.calls]:
        case = op.good()
        edit(case)
        meta = any(t.device.type == "meta" for _, t in case.flat())
        # torch's dispatcher takes a meta tensor to the fake, which knows no names
        blamed = "tensors" if meta and label != "reference" else argument
        assert_rejected(kernel, case, blamed)


@each_op(ROWS)
def test_a_loss_of_no_samples_is_refused(op):
    (empty, *_) = op.sizes["empty"]
    case = op.make(empty)
    with pytest.raises(ValueError, match="at least one sample"):
        op.loss(*case.tensors.values(), *case.scalars.values())
