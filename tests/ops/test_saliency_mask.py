import math

import pytest
import torch
from cases import (
    LAYOUT_SHAPES,
    LAYOUTS,
    MIXED,
    SIZES,
    Case,
    assert_all_entries_reject,
    assert_deterministic,
    assert_layout_does_not_matter,
    assert_matches_reference,
    assert_noncontiguous_is_right_or_refused,
    assert_opcheck,
    bad_lists,
    bad_numbers,
    blame,
    compiled_equals_eager,
    each_size,
    mask_bits,
    reject_params,
    shifted,
    value_list,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sfron_fast import functional
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops

FLOATS = [torch.float32, torch.float64]
EPS = reference.FISHER_EPS


def make(
    shapes=((3,), (65,)), dtype=torch.float32, device="cpu", threshold=1.0, eps=EPS, special=False
) -> Case:
    lists = {
        name: [f * f for f in value_list(shapes, dtype, device, special=special * number)]
        for number, name in ((1, "forget"), (2, "retain"))
    }
    return Case(lists, {"threshold": threshold, "eps": eps})


@pytest.mark.parametrize("threshold", [0.1, 1.0, 3.0, 1e30])
@pytest.mark.parametrize("eps", [0.0, EPS, 1.0])
@pytest.mark.parametrize("special", [False, True], ids=["normal", "special"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(device, dtype, special, eps, threshold):
    case = make(MIXED, dtype, device, threshold, eps, special)
    assert_matches_reference("saliency_mask", case, functional.saliency_mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hand_example(device, dtype):
    """forget (4, 1, 2, 0 ... 0, 9), retain (1, 1, 1, 1 ...

    1, 9), threshold 2: elements 0 and 2 = 0b101, then none.
    """
    forget = torch.tensor([4.0, 1.0, 2.0, 0, 0, 0, 0, 0, 9.0], dtype=dtype, device=device)
    retain = torch.tensor([1.0, 1.0, 1.0, 1, 1, 1, 1, 1, 9.0], dtype=dtype, device=device)
    masks, counts = functional.saliency_mask([forget, retain], [retain, retain], 2.0, 0.0)
    assert [m.tolist() for m in masks] == [[0b101, 0], [0, 0]]
    assert counts.tolist() == [2, 0]
    assert functional.saliency_mask([retain], [retain], 1.0)[0][0].tolist() == [255, 1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_out_is_untouched(device, dtype):
    """Neither NaN nor the unused bits of the last byte ever count as selected; the inputs stay."""
    for n in (1, 7, 8, 31, 33, 63, 65, 513):
        ones = torch.ones(n, dtype=dtype, device=device)
        masks, counts = functional.saliency_mask(
            [ones, ones * math.nan, ones], [ones, ones, ones * math.nan], 1.0
        )
        assert counts.tolist() == [n, 0, 0]
        assert int.from_bytes(bytes(masks[0].tolist()), "little") == 2**n - 1
        assert not masks[1].any()
        assert not masks[2].any()
        assert (ones == 1).all()


@pytest.mark.checklist("E2")
def test_opcheck(device):
    assert_opcheck("saliency_mask", make([(5,), (0,), (), (65,)], torch.float32, device))


def test_compile(device):
    cases = [make([(5,), (0,), (70,)], torch.float32, device) for _ in range(3)]
    assert compiled_equals_eager(ops.saliency_mask, cases) == 1


@pytest.mark.checklist("B7")
def test_deterministic(device, set_threads):
    assert_deterministic(
        make([*MIXED, (200_001,)], torch.float32, device), ops.saliency_mask, set_threads
    )


@each_size
def test_empty_odd_and_large(device, dtype, size):
    if dtype not in FLOATS:
        dtype = torch.float32
    masks, counts = functional.saliency_mask([], [], 1.0)
    assert masks == []
    assert counts.tolist() == []
    case = make(SIZES[size], dtype, device)
    assert_matches_reference("saliency_mask", case.clone(), functional.saliency_mask)
    if size != "many":
        assert_matches_reference("saliency_mask", case.map(shifted), functional.saliency_mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    """Bit i is element i in logical order, whatever the strides."""
    case = make(LAYOUT_SHAPES, dtype, device)
    assert_layout_does_not_matter("saliency_mask", case, LAYOUTS[layout], functional.saliency_mask)
    if dtype != torch.float64:
        assert_noncontiguous_is_right_or_refused("saliency_mask", case)


def low_precision(case):
    case.tensors["forget"][0] = case.tensors["forget"][0].bfloat16()


LISTS = blame(
    bad_lists("forget", "retain"), ("forget-short", "forget-shape", "forget-meta"), "retain"
)


@reject_params(
    [
        *LISTS,
        ("forget-bf16", low_precision, "forget"),
        *bad_numbers(threshold=(0.0, -1.0), eps=(-1.0,)),
    ]
)
def test_rejects(edit, argument):
    assert_all_entries_reject("saliency_mask", make, edit, argument)


def test_version_counter():
    """Nothing is written: no version moves."""
    case = make()
    before = [t._version for _, t in case.flat()]
    case.run(functional.saliency_mask)
    assert [t._version for _, t in case.flat()] == before


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=200))
def test_packing_is_little_endian(bits):
    packed = reference.pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert int.from_bytes(bytes(packed.tolist()), "little") == sum(
        1 << i for i, bit in enumerate(bits) if bit
    )
    assert reference.unpack_bits(packed, (len(bits),)).tolist() == bits


def test_masks_of_the_op_select_in_a_step(device):
    """The packing that saliency_mask writes is the one the steps read."""
    wanted = mask_bits((1003,), device)
    masks, counts = functional.saliency_mask(
        [wanted.float()], [torch.full((1003,), 0.5, device=device)], 1.0
    )
    param = torch.zeros(1003, device=device)
    functional.sgd_step_([param], [torch.ones_like(param)], lr=1.0, masks=masks)
    assert torch.equal(param, torch.where(wanted, -1.0, 0.0))
    assert counts.tolist() == [int(wanted.sum())]
