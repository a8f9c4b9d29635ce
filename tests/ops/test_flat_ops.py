"""Every list that an op takes flat (one tensor for many): the bits of ordinary lists, and padding
left alone.
"""

import pytest
import test_adamw_step
import test_fisher_accumulate
import test_interpolate
import test_masked_grad_norm
import test_saliency_mask
import test_sgd_step
import torch
from cases import (
    NATIVE_DTYPES,
    ODD,
    Case,
    assert_rejected,
    assert_same_bits,
    assert_same_case,
    entries,
    flat_outputs,
    shifted,
)
from torch import Tensor

from sfron_fast.ops.lists import UNIT

SHAPES = [(0,), *ODD, (511,), (2049,), (3, 683), (2,)]
STEP = {
    "masked": True,
    "slow_save": True,
    "slow_from": True,
    "slow_lr": 0.3,
    "norm": 5.0,
    "max_norm": 1.0,
}
STATES = ("slow_save", "slow_from", "masks")
CASES = {  # op: (its arguments, the list that others are like, those that may be flat)
    "masked_grad_norm": (test_masked_grad_norm.make, {}, "grads", ("masks",)),
    "sgd_step_": (
        test_sgd_step.make,
        {**STEP, "momentum": 0.9},
        "params",
        ("grads", "momentum_buffers", *STATES),
    ),
    "adamw_step_": (
        test_adamw_step.make,
        {**STEP, "amsgrad": True},
        "params",
        ("grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", *STATES),
    ),
    "interpolate_": (test_interpolate.make, {}, "slow", ("fast",)),
    "fisher_accumulate_": (test_fisher_accumulate.make, {}, "grads", ("fisher",)),
    "saliency_mask": (test_saliency_mask.make, {}, "forget", ("retain",)),
}
WAYS = [(op, name) for op, (*_, names) in CASES.items() for name in (*names, "all")]
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
    """An op's case, and the same with one tensor in place of each list of ``names``."""
    build, flags, key, _ = CASES[op]
    case = build(SHAPES, torch.float32 if op == "saliency_mask" else dtype, device, **flags)
    return case, case.tensors[key]


def with_flat(case: Case, like: list[Tensor], names, off=False) -> Case:
    changed = case.clone()
    for name in names:
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
    names = CASES[op][3] if name == "all" else (name,)
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
    "integers": lambda t: t.to(torch.int16),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("op", "name"), [way for way in WAYS if way[1] != "all"])
def test_rejects(op, name, wrong):
    case, like = make(op, torch.float32, "cpu")
    for _, kernel in entries(op):
        bad = with_flat(case, like, [name])
        bad.tensors[name] = [WRONG[wrong](bad.tensors[name][0])]
        assert_rejected(kernel, bad, name)
