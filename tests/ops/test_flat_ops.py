"""Every list that an op takes flat (one tensor for many): the bits of ordinary lists, and padding
left alone.
"""

import pytest
import torch
from cases import NATIVE_DTYPES, ODD, Case, shifted
from judging import assert_same_bits, assert_same_case, entries, flat_outputs
from op_table import LISTS
from spoiling import assert_rejected
from torch import Tensor

from sfron_fast.ops.lists import UNIT

SHAPES = [(0,), *ODD, (511,), (2049,), (3, 683), (2,)]
WAYS = [(name, flat) for name, op in LISTS.items() for flat in (*op.flat, "all")]
PADDING = 7


def flatten(name: str, tensors: list[Tensor], like: list[Tensor]) -> Tensor:
    """One tensor of ``tensors``; the elements between them are PADDING."""
    if name == "steps":
        return torch.stack(tensors)
    units = -(-torch.tensor([t.numel() for t in like]) // UNIT) * (8 if name == "masks" else UNIT)
    whole = tensors[0].new_full((int(units.sum()),), PADDING)
    for part, tensor in zip(whole.split(units.tolist()), tensors, strict=True):
        part[: tensor.numel()] = tensor.reshape(-1)
    return whole


def make(op, dtype, device):
    """An op's case, and the list that the others are like."""
    entry = LISTS[op]
    kind = dtype if dtype in entry.dtypes else torch.float32
    case = entry.make(SHAPES, kind, device, **entry.flat_settings)
    return case, case.tensors[entry.like]


def with_flat(case: Case, like: list[Tensor], names, off=False) -> Case:
    changed = case.clone()
    for name in filter(case.tensors.get, names):  # corrections are of bf16 only
        whole = flatten(name, case.tensors[name], like)
        changed.tensors[name] = [shifted(whole) if off else whole]
    return changed


def assert_equal(
    op: str, got: Case, got_outputs, wanted: Case, wanted_outputs, like, names
) -> None:
    """Also the padding, which ``flatten`` writes into what is wanted."""
    assert_same_case(got, with_flat(wanted, like, names))
    for a, b in zip(flat_outputs(got_outputs), flat_outputs(wanted_outputs), strict=True):
        if op == "masked_grad_norm":  # additions in another order
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2.4e-7, atol=0)
        else:
            assert_same_bits(a, b)


@pytest.mark.parametrize("off", [False, True], ids=["", "misaligned"])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize(("op", "name"), WAYS)
def test_flat_equals_lists(device, op, name, dtype, off):
    """Of both kernels; and of the CPU's reference, whatever the device."""
    case, like = make(op, dtype, device)
    names = LISTS[op].flat if name == "all" else (name,)
    expected = case.map(lambda t: t.cpu()).clone()
    outputs = expected.run(dict(entries(op))["reference"])
    for _, kernel in entries(op):
        mine = with_flat(case, like, names, off)
        assert_equal(op, mine, mine.run(kernel), expected, outputs, like, names)


def longer(whole):
    return torch.cat([whole, whole[:1]])


def square(whole):
    return whole.view(-1, 1)


WRONG = {
    "longer": longer,
    "shorter": lambda t: t[:-1],
    "square": square,
    "integers": lambda t: t.to(torch.int32),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("op", "name"), [way for way in WAYS if way[1] != "all"])
def test_rejects(op, name, wrong):
    case, like = make(op, torch.bfloat16 if "corrections" in name else torch.float32, "cpu")
    for _, kernel in entries(op):
        bad = with_flat(case, like, [name])
        bad.tensors[name] = [WRONG[wrong](bad.tensors[name][0])]
        assert_rejected(kernel, bad, name)
