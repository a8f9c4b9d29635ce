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
    shapes=((3,), (65,)), dtype=torch.float32, device="cpu", weight=0.7, special=False, numbers=None
) -> Case:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fisher = [f.abs() for f in value_list(shapes, wide, device, special=special * 1)]
    tensors = {"fisher": fisher, "grads": value_list(shapes, dtype, device, special=special * 2)}
    if numbers is not None:
        tensors["numbers"] = torch.tensor([numbers], dtype=torch.float64, device=device)
    return Case(tensors, {"weight": weight})


@pytest.mark.parametrize("weight", [0.0, 1.0, 1 / 3, 128.0])
@pytest.mark.parametrize("special", [False, True], ids=["normal", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, special, weight):
    case = make(MIXED, dtype, device, weight, special)
    assert_matches_reference("fisher_accumulate_", case, functional.fisher_accumulate_)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """1 + 1/2 3^2 = 5.5, and again: 10; a square beyond fp16 (300^2 = 90000) is an ordinary fp32
    number.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fisher = torch.tensor([1.0, 0.0], dtype=wide, device=device)
    grad = torch.tensor([3.0, 300.0], dtype=dtype, device=device)
    functional.fisher_accumulate_([fisher], [grad], 0.5)
    assert fisher.tolist() == [5.5, 45000.0]
    functional.fisher_accumulate_([fisher], [grad], 0.5)
    assert fisher.tolist() == [10.0, 90000.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype):
    """No mask here: the gradients stay, and what lies next to a view in its storage."""
    case = make([(1,), (65,), (33, 31)], dtype, device).map(shifted)
    grads = [g.clone() for g in case.tensors["grads"]]
    case.run(functional.fisher_accumulate_)
    assert_neighbours_untouched(case)
    for grad, before in zip(case.tensors["grads"], grads, strict=True):
        assert torch.equal(grad, before)


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype):
    assert_opcheck("fisher_accumulate_", make([(5,), (0,), (), (65,)], dtype, device))


def test_compile(device):
    cases = [make([(5,), (0,), (70,)], torch.bfloat16, device) for _ in range(3)]
    assert compiled_equals_eager(ops.fisher_accumulate_, cases) == 1


def test_compile_changing_numbers(device):
    """A number that changes goes in through ``numbers``: one compilation.

    (Of Python floats torch guards the value.)
    """
    cases = [make(device=device, numbers=0.1 * i) for i in range(10)]
    for kernel in (ops.fisher_accumulate_, functional.fisher_accumulate_):
        assert compiled_equals_eager(kernel, cases) == 1


@pytest.mark.parametrize("weight", [0.0, 1 / 3, 128.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_stands_for_the_number(device, dtype, weight):
    case, other = (
        make(MIXED, dtype, device, weight),
        make(MIXED, dtype, device, 0.2, numbers=weight),
    )
    for name in ("fisher", "grads"):
        other.tensors[name] = [t.clone() for t in case.tensors[name]]
    assert_matches_reference("fisher_accumulate_", other, functional.fisher_accumulate_)
    case.run(functional.fisher_accumulate_)
    del other.tensors["numbers"]
    assert_same_case(other, case)


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    assert_deterministic(make(MIXED, dtype, device), ops.fisher_accumulate_, set_threads)


@each_size
def test_empty_odd_and_large(device, dtype, size):
    functional.fisher_accumulate_([], [], 1.0)
    case = make(SIZES[size], dtype, device)
    assert_matches_reference("fisher_accumulate_", case.clone(), functional.fisher_accumulate_)
    if size != "many":
        assert_matches_reference(
            "fisher_accumulate_", case.map(shifted), functional.fisher_accumulate_
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    case = make(LAYOUT_SHAPES, dtype, device)
    assert_layout_does_not_matter(
        "fisher_accumulate_", case, LAYOUTS[layout], functional.fisher_accumulate_
    )
    if dtype != torch.float64:
        assert_noncontiguous_is_right_or_refused("fisher_accumulate_", case)


def halve(case):
    case.tensors["fisher"][1] = case.tensors["fisher"][1].bfloat16()


LISTS = blame(bad_lists("fisher", "grads"), ("grads-short", "grads-shape"), "fisher")


@reject_params(
    [
        *LISTS,
        ("fisher-bf16", halve, "fisher"),
        *bad_numbers(weight=(-1.0,)),
        *bad_tensor_numbers([0.5], ["weight"]),
    ]
)
def test_rejects(edit, argument):
    assert_all_entries_reject("fisher_accumulate_", make, edit, argument)


def test_version_counter():
    assert_refuses_leaf_and_bumps_version(
        lambda p: functional.fisher_accumulate_([p], [torch.ones(5)], 1.0)
    )


def test_sums_do_not_depend_on_the_order_of_tensors(device):
    case = make(MIXED, torch.float32, device)
    backwards = Case(
        {name: list(reversed(ts)) for name, ts in case.clone().tensors.items()}, case.scalars
    )
    case.run(functional.fisher_accumulate_)
    backwards.run(functional.fisher_accumulate_)
    for a, b in zip(case.tensors["fisher"], reversed(backwards.tensors["fisher"]), strict=True):
        assert_same_bits(a, b)
