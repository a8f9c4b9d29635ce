import itertools
import math

import pytest
import tolerances
import torch
from cases import DTYPES, lazy_zeros, value_list

from sfron_fast import functional
from sfron_fast.ops import registry as ops

TORCH_FLAGS = [
    dict(zip(("momentum", "dampening", "nesterov", "weight_decay", "maximize"), flags, strict=True))
    for flags in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.01), (False, True)
    )
    if not (flags[2] and (flags[0] == 0.0 or flags[1] > 0.0))  # torch refuses these
]


@pytest.mark.parametrize(
    "flags", TORCH_FLAGS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items() if v) or "plain"
)
def test_matches_torch(device, flags):
    lr, steps = 0.05, 6
    mine = value_list([(1000,)], torch.float32, device)
    theirs = [p.clone().requires_grad_() for p in mine]
    buffers = [torch.full_like(p, math.nan) for p in mine] if flags["momentum"] else []
    optimizer = torch.optim.SGD(theirs, lr=lr, **flags)
    size = torch.zeros_like(mine[0])
    for step in range(steps):
        grads = value_list([(1000,)], torch.float32, device)
        theirs[0].grad = grads[0].clone()
        size = torch.maximum(size, mine[0].abs())
        optimizer.step()
        functional.sgd_step_(mine, grads, buffers, lr=lr, first=step == 0, **flags)
        terms = grads[0].abs() + (flags["momentum"] * buffers[0].abs() if buffers else 0.0)
        size = torch.maximum(size, torch.maximum(mine[0].abs(), lr * terms))
        error = (mine[0] - theirs[0].detach()).abs()
        bound = tolerances.optimizer_step(step + 1, size)
        assert (error <= bound).all(), float((error / bound).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """p = 1, g = 1 / grad_scale 2 + decay 1/2 p = 1; m = 1/2 2 + 1 = 2; p - 1/4 2 = 1/2; slow 0 +
    1/4 (1/2 - 0) = 1/8.

    The masked-out neighbour: g = 1/2; m = 1/2 2 + 1/2 = 3/2; p - 3/8 = 5/8; slow 5/32. The next one
    is clipped only by the mask byte, not by its gradient of 10^4, and goes the same way.
    """
    p, m, slow, out = (
        torch.full((3,), x, dtype=dtype, device=device) for x in (1.0, 2.0, 0.0, 9.0)
    )
    grad = torch.tensor([1.0, 1.0, 1e4], dtype=dtype, device=device)
    functional.sgd_step_(
        [p],
        [grad],
        [m],
        lr=0.25,
        momentum=0.5,
        weight_decay=0.5,
        slow_save=[out],
        slow_from=[slow],
        slow_lr=0.25,
        masks=[torch.tensor([0b001], dtype=torch.uint8, device=device)],
        grad_scale=torch.tensor(2.0, device=device),
    )
    assert m.tolist() == [2.0, 1.5, 1.5]
    assert p.tolist() == [0.125, 0.15625, 0.15625]
    assert out.tolist() == [1.0] * 3


def test_momentum_after_a_skipped_first_step(device):
    """An uninitialised buffer is 0 after a skipped first step, never what the memory held."""
    buffer = torch.full((65,), math.nan, device=device)
    param, grad = torch.ones(65, device=device), torch.ones(65, device=device)
    found_inf = torch.ones((), device=device)
    functional.sgd_step_(
        [param], [grad], [buffer], lr=1.0, momentum=0.9, first=True, found_inf=found_inf
    )
    assert torch.equal(buffer, torch.zeros_like(buffer))
    assert torch.equal(param, torch.ones_like(param))


@pytest.mark.long
def test_index_arithmetic_above_2_31():
    if ops.kernel_for("sgd_step_", "cpu") != "native":
        pytest.skip("the reference would widen 2^31 elements to fp32")
    numel = 2**31 + 65
    param, grad = lazy_zeros(numel, torch.bfloat16), lazy_zeros(numel, torch.bfloat16)
    mask = lazy_zeros((numel + 7) // 8, torch.uint8)
    places = [0, 2**31 - 1, 2**31, numel - 1]
    grad[torch.tensor(places)] = 1.0
    for at in (places[0], places[2], places[3]):
        mask[at // 8] |= 1 << at % 8
    functional.sgd_step_([param], [grad], lr=0.5, masks=[mask])
    assert param[torch.tensor(places)].tolist() == [-0.5, 0.0, -0.5, -0.5]
    assert int(torch.count_nonzero(param)) == 3
