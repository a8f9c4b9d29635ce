import math

import pytest
import torch
from cases import mask_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from list_ops import SALIENCY_MASK

from sfron_fast import functional
from sfron_fast.ops import reference


@pytest.mark.parametrize("dtype", SALIENCY_MASK.dtypes, ids=str)
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


@pytest.mark.parametrize("dtype", SALIENCY_MASK.dtypes, ids=str)
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
