import pytest
import torch
from cases import DTYPES, MIXED, Case
from judging import assert_same_bits
from list_ops import fisher_case as make

from sfron_fast import functional


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


def test_sums_do_not_depend_on_the_order_of_tensors(device):
    case = make(MIXED, torch.float32, device)
    backwards = Case(
        {name: list(reversed(ts)) for name, ts in case.clone().tensors.items()}, case.scalars
    )
    case.run(functional.fisher_accumulate_)
    backwards.run(functional.fisher_accumulate_)
    for a, b in zip(case.tensors["fisher"], reversed(backwards.tensors["fisher"]), strict=True):
        assert_same_bits(a, b)
