import pytest
import torch
from cases import DTYPES, MIXED
from judging import assert_same_bits, assert_same_case, compiled_equals_eager
from list_ops import interpolate_case as make

from sfron_fast import functional
from sfron_fast.ops import registry as ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """1 + 1/4 (5 - 1) = 2 and, from the other end, 5 - (5 - 1) (1 - 3/4) = 4."""
    for slow_lr, expected in ((0.25, 2.0), (0.75, 4.0)):
        slow, fast = (torch.full((3,), x, dtype=dtype, device=device) for x in (1.0, 5.0))
        functional.interpolate_([slow], [fast], slow_lr)
        assert slow.tolist() == fast.tolist() == [expected] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype):
    """No mask here: with slow_lr = 0 the slow weights stay."""
    case = make([(65,)], dtype, device, slow_lr=0.0)
    before = case.tensors["slow"][0].clone()
    case.run(functional.interpolate_)
    assert torch.equal(case.tensors["slow"][0], before)
    assert torch.equal(case.tensors["fast"][0], before)


def test_compile_by_inductor(device):
    cases = [make([(5,), (0,), (70,)], torch.float32, device) for _ in range(3)]
    assert compiled_equals_eager(ops.op("interpolate_"), cases, "inductor") == 1


def test_repeated_call_is_stable(device):
    """The second call finds slow == fast, so nothing may move."""
    case = make(MIXED, torch.float32, device, slow_lr=0.3)
    case.run(functional.interpolate_)
    before = case.clone()
    case.run(functional.interpolate_)
    assert_same_case(case, before)
    assert_same_bits(case.tensors["slow"][0], case.tensors["fast"][0])
