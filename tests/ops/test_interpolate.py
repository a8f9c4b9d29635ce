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
    assert_same_bits,
    assert_same_case,
    bad_lists,
    bad_numbers,
    bad_tensor_numbers,
    blame,
    compiled_equals_eager,
    each_size,
    reject_params,
    shifted,
    value_list,
)

from sfron_fast import functional
from sfron_fast.ops import registry as ops


def make(
    shapes=((3,), (65,)),
    dtype=torch.float32,
    device="cpu",
    slow_lr=0.3,
    special=False,
    numbers=None,
) -> Case:
    lists = {
        name: value_list(shapes, dtype, device, special=special * number)
        for number, name in ((1, "slow"), (2, "fast"))
    }
    if numbers is not None:
        lists["numbers"] = torch.tensor([numbers], dtype=torch.float64, device=device)
    return Case(lists, {"slow_lr": slow_lr})


@pytest.mark.parametrize("slow_lr", [0.0, 0.1, 0.49999, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("special", [False, True], ids=["normal", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, special, slow_lr):
    assert_matches_reference(
        "interpolate_", make(MIXED, dtype, device, slow_lr, special), functional.interpolate_
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """1 + 1/4 (5 - 1) = 2 and, from the other end, 5 - (5 - 1) (1 - 3/4) = 4."""
    for slow_lr, expected in ((0.25, 2.0), (0.75, 4.0)):
        slow, fast = (torch.full((3,), x, dtype=dtype, device=device) for x in (1.0, 5.0))
        functional.interpolate_([slow], [fast], slow_lr)
        assert slow.tolist() == fast.tolist() == [expected] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype):
    """No mask here: what lies next to a view in its storage must stay, and with slow_lr = 0 the
    slow weights.
    """
    case = make([(1,), (65,), (33, 31)], dtype, device).map(shifted)
    functional.interpolate_(**case.tensors, **case.scalars)
    assert_neighbours_untouched(case)
    case = make([(65,)], dtype, device, slow_lr=0.0)
    before = case.tensors["slow"][0].clone()
    case.run(functional.interpolate_)
    assert torch.equal(case.tensors["slow"][0], before)
    assert torch.equal(case.tensors["fast"][0], before)


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype):
    assert_opcheck("interpolate_", make([(5,), (0,), (), (65,)], dtype, device))


def test_compile(device):
    cases = [make([(5,), (0,), (70,)], torch.float32, device) for _ in range(3)]
    assert compiled_equals_eager(ops.interpolate_, cases, "inductor") == 1
    assert compiled_equals_eager(functional.interpolate_, cases) == 1


def test_compile_changing_numbers(device):
    """A number that changes goes in through ``numbers``: one compilation.

    (Of Python floats torch guards the value.)
    """
    cases = [make(device=device, numbers=0.1 * i) for i in range(10)]
    for kernel in (ops.interpolate_, functional.interpolate_):
        assert compiled_equals_eager(kernel, cases) == 1


@pytest.mark.parametrize("slow_lr", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_stands_for_the_number(device, dtype, slow_lr):
    case, other = (
        make(MIXED, dtype, device, slow_lr),
        make(MIXED, dtype, device, 0.2, numbers=slow_lr),
    )
    for name in ("slow", "fast"):
        other.tensors[name] = [t.clone() for t in case.tensors[name]]
    assert_matches_reference("interpolate_", other, functional.interpolate_)
    case.run(functional.interpolate_)
    del other.tensors["numbers"]
    assert_same_case(other, case)


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    assert_deterministic(make(MIXED, dtype, device), ops.interpolate_, set_threads)


@each_size
def test_empty_odd_and_large(device, dtype, size):
    functional.interpolate_([], [], 0.5)
    case = make(SIZES[size], dtype, device)
    assert_matches_reference("interpolate_", case.clone(), functional.interpolate_)
    if size != "many":
        assert_matches_reference("interpolate_", case.map(shifted), functional.interpolate_)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    case = make(LAYOUT_SHAPES, dtype, device)
    assert_layout_does_not_matter("interpolate_", case, LAYOUTS[layout], functional.interpolate_)
    if dtype != torch.float64:
        assert_noncontiguous_is_right_or_refused("interpolate_", case)


LISTS = blame(bad_lists("slow", "fast"), ("slow-short", "slow-shape"), "fast")


@reject_params([*LISTS, *bad_numbers(slow_lr=(-0.1, 1.1)), *bad_tensor_numbers([0.5], ["slow_lr"])])
def test_rejects(edit, argument):
    assert_all_entries_reject("interpolate_", make, edit, argument)


def test_meta_beside_cpu():
    case = make()
    case.tensors["fast"][1] = case.tensors["fast"][1].to("meta")
    with pytest.raises((ValueError, RuntimeError)):
        case.run(functional.interpolate_)


def test_version_counter():
    assert_refuses_leaf_and_bumps_version(
        lambda p: functional.interpolate_([p], [torch.ones(5)], 0.5)
    )
    assert_refuses_leaf_and_bumps_version(
        lambda p: functional.interpolate_([torch.ones(5)], [p], 0.5)
    )


def test_repeated_call_is_stable(device):
    """The second call finds slow == fast, so nothing may move."""
    case = make(MIXED, torch.float32, device, slow_lr=0.3)
    case.run(functional.interpolate_)
    before = case.clone()
    case.run(functional.interpolate_)
    assert_same_case(case, before)
    assert_same_bits(case.tensors["slow"][0], case.tensors["fast"][0])
