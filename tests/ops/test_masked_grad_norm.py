import math

import pytest
import tolerances
import torch
from cases import DTYPES, MIXED, lazy_zeros
from judging import assert_same_bits
from list_ops import norm_case as make

from sfron_fast import functional
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """Bits 0 and 2 of 0b101 keep 3 and 4 of (3, 100, 4): norm 5, unscaled by 2 it is 2.5."""
    grad = torch.tensor([3.0, 100.0, 4.0], dtype=dtype, device=device)
    mask = torch.tensor([0b101], dtype=torch.uint8, device=device)
    assert functional.masked_grad_norm([grad], [mask]).item() == 5.0
    assert (
        functional.masked_grad_norm(
            [grad], [mask], grad_scale=torch.tensor(2.0, device=device)
        ).item()
        == 2.5
    )
    none = torch.zeros(0, dtype=torch.uint8, device=device)
    assert functional.masked_grad_norm([grad[::2], grad[1:2] * 0.12], [none, none]).item() == 13.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_masked_out_is_untouched(device, dtype, poison):
    """A non-finite gradient counts where it is selected, and only there."""
    case = make(MIXED[:-1], dtype, device)
    expected = case.run(functional.masked_grad_norm)
    for grad, mask in zip(case.tensors["grads"], case.tensors["masks"], strict=True):
        grad.copy_(torch.where(reference.unpack_bits(mask, grad.shape), grad, poison))
    assert_same_bits(case.run(functional.masked_grad_norm), expected)
    for at in (0, 31, 32, 64):
        grads, masks = (
            [torch.zeros(65, dtype=dtype, device=device)],
            [torch.zeros(9, dtype=torch.uint8, device=device)],
        )
        grads[0][at] = poison
        assert functional.masked_grad_norm(grads, masks).item() == 0.0
        masks[0][at // 8] = 1 << at % 8
        assert not math.isfinite(functional.masked_grad_norm(grads, masks).item())
        assert not math.isfinite(functional.masked_grad_norm(grads).item())


@pytest.mark.long
def test_index_arithmetic_above_2_31():
    if ops.kernel_for("masked_grad_norm", "cpu") != "native":
        pytest.skip("the reference would widen 2^31 elements to fp64")
    numel = 2**31 + 65
    grad = lazy_zeros(numel, torch.bfloat16)
    for at, value in ((0, 2.0), (2**31 - 1, 4.0), (2**31, 4.0), (numel - 1, 8.0)):
        grad[at] = value
    assert functional.masked_grad_norm([grad]).item() == 10.0
    mask = lazy_zeros((numel + 7) // 8, torch.uint8)
    mask[-1], mask[2**28] = 1, 1  # the last element and element 2^31
    assert functional.masked_grad_norm([grad], [mask]).item() == pytest.approx(
        math.sqrt(80.0), rel=tolerances.U
    )
