import math

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUT_SHAPES,
    LAYOUTS,
    MIXED,
    NATIVE_DTYPES,
    SIZES,
    Case,
    assert_all_entries_reject,
    assert_deterministic,
    assert_layout_does_not_matter,
    assert_matches_reference,
    assert_neighbours_untouched,
    assert_noncontiguous_is_right_or_refused,
    assert_opcheck,
    assert_refuses_leaf_and_bumps_version,
    assert_same_lists,
    bad_lists,
    bad_numbers,
    blame,
    compiled_equals_eager,
    each_size,
    named,
    reject_params,
    shifted,
    value_list,
)

from sfron_fast import functional
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops

NUMBERS = {"weight": 0.7, "total": 3.0, "threshold": 1.0, "eps": reference.FISHER_EPS}


def make(shapes=((3,), (65,)), dtype=torch.float32, device="cpu", special=False, **numbers) -> Case:
    wide = reference.accumulate_dtype(dtype)
    tensors = {
        name: [f * f for f in value_list(shapes, wide, device, special=special * number)]
        for number, name in ((1, "retain"), (2, "forget"))
    }
    tensors["grads"] = value_list(shapes, dtype, device, special=special * 3)
    sizes = [math.prod(shape) for shape in shapes]
    tensors["masks"] = [
        torch.full(((n + 7) // 8,), 0xA5, dtype=torch.uint8, device=device) for n in sizes
    ]
    tensors["counts"] = torch.full((len(sizes),), -1, dtype=torch.int64, device=device)
    return Case(tensors, NUMBERS | numbers)


def through_functional(retain, grads, forget, masks, counts, **numbers):
    packed, selected = functional.fisher_saliency_mask_(retain, grads, forget, **numbers)
    for mask, bits in zip(masks, packed, strict=True):
        mask.copy_(bits)
    counts.copy_(selected)


@pytest.mark.parametrize(
    "numbers", [{}, {"total": 1.0, "eps": 0.0}, {"weight": 0.0, "threshold": 3.0}, {"eps": 1.0}]
)
@pytest.mark.parametrize("special", [False, True], ids=["normal", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, special, numbers):
    case = make(MIXED, dtype, device, special, **numbers)
    assert_matches_reference("fisher_saliency_mask_", case, through_functional)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("total", [1.0, 3.0, 45000.0])
def test_equals_the_ops_it_fuses(device, dtype, total):
    case = make(MIXED, dtype, device, total=total)
    apart = case.clone().tensors
    case.run(ops.fisher_saliency_mask_)
    functional.fisher_accumulate_(apart["retain"], apart["grads"], NUMBERS["weight"])
    torch._foreach_div_(apart["retain"], total)
    masks, counts = functional.saliency_mask(apart["forget"], apart["retain"], NUMBERS["threshold"])
    assert_same_lists(named(case.tensors["retain"]), named(apart["retain"]))
    assert_same_lists(
        named([*case.tensors["masks"], case.tensors["counts"]]), named([*masks, counts])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """(1 + 1/2 4^2) / 3 = 3 and (0 + 1/2 300^2) / 3 = 15000; forget 6 and 29999 against twice that:
    bit 0 alone.
    """
    wide = reference.accumulate_dtype(dtype)
    retain = torch.tensor([1.0, 0.0], dtype=wide, device=device)
    forget = torch.tensor([6.0, 29999.0], dtype=wide, device=device)
    grad = torch.tensor([4.0, 300.0], dtype=dtype, device=device)
    masks, counts = functional.fisher_saliency_mask_(
        [retain], [grad], [forget], weight=0.5, total=3.0, threshold=2.0, eps=0.0
    )
    assert retain.tolist() == [3.0, 15000.0]
    assert masks[0].tolist() == [0b01]
    assert counts.tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype):
    """What lies next to a view, the gradients and the forget Fisher stay; a NaN and unused bits are
    never selected.
    """
    case = make([(1,), (65,), (33, 31)], dtype, device)
    for name in ("retain", "grads", "forget"):
        case.tensors[name] = [shifted(t) for t in case.tensors[name]]
    before = case.clone()
    case.run(through_functional)
    lists = {name: case.tensors[name] for name in ("retain", "grads", "forget")}
    assert_neighbours_untouched(Case(lists, {}))
    for name in ("grads", "forget"):
        assert_same_lists(named(case.tensors[name]), named(before.tensors[name]))
    for n in (1, 7, 8, 31, 33, 63, 65, 513):
        case = make([(n,)] * 2, dtype, device, threshold=1e-30, eps=1.0)
        case.tensors["grads"][1].fill_(math.nan)
        case.run(through_functional)
        masks = case.tensors["masks"]
        assert case.tensors["counts"].tolist() == [n, 0]
        assert int.from_bytes(bytes(masks[0].tolist()), "little") == 2**n - 1
        assert not masks[1].any()


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype):
    assert_opcheck("fisher_saliency_mask_", make([(5,), (0,), (), (65,)], dtype, device))


def test_compile(device):
    cases = [make([(5,), (0,), (70,)], torch.bfloat16, device) for _ in range(3)]
    for kernel in (ops.fisher_saliency_mask_, through_functional):
        assert compiled_equals_eager(kernel, cases) == 1


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    case = make([*MIXED, (200_001,)], dtype, device)
    assert_deterministic(case, ops.fisher_saliency_mask_, set_threads)


@each_size
def test_empty_odd_and_large(device, dtype, size):
    masks, counts = functional.fisher_saliency_mask_([], [], [], weight=1.0, threshold=1.0)
    assert masks == []
    assert counts.tolist() == []
    case = make(SIZES[size], dtype, device)
    assert_matches_reference("fisher_saliency_mask_", case.clone(), through_functional)
    if size != "many":
        case = case.map(shifted)
        assert_matches_reference("fisher_saliency_mask_", case, through_functional)
        assert_neighbours_untouched(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    case = make(LAYOUT_SHAPES, dtype, device)
    assert_layout_does_not_matter(
        "fisher_saliency_mask_", case, LAYOUTS[layout], through_functional
    )
    if dtype != torch.float64:
        assert_noncontiguous_is_right_or_refused("fisher_saliency_mask_", case)


def change(name, value):
    return lambda case: case.tensors.update({name: value})


LISTS = ("retain", "grads", "forget", "masks")
BAD = [
    *blame(bad_lists(*LISTS), ("grads-short", "grads-shape"), "retain"),
    ("retain-bf16", change("retain", [torch.ones(3).bfloat16(), torch.ones(65)]), "retain"),
    ("forget-bf16", change("forget", [torch.ones(3).bfloat16(), torch.ones(65)]), "forget"),
    ("counts-short", change("counts", torch.zeros(1, dtype=torch.int64)), "counts"),
    ("counts-int32", change("counts", torch.zeros(2, dtype=torch.int32)), "counts"),
    *bad_numbers(weight=(-1.0,), total=(0.0, -1.0), threshold=(0.0, -1.0), eps=(-1.0,)),
]


@reject_params(BAD)
def test_rejects(edit, argument):
    assert_all_entries_reject("fisher_saliency_mask_", make, edit, argument)


def test_version_counter():
    ones = [torch.ones(5)]
    assert_refuses_leaf_and_bumps_version(
        lambda p: functional.fisher_saliency_mask_([p], ones, ones, weight=1.0, threshold=1.0)
    )
