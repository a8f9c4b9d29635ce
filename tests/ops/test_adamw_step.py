import itertools
import math

import pytest
import tolerances
import torch
from cases import DTYPES, value_list

from sfron_fast import functional

TORCH_FLAGS = [
    dict(zip(("decoupled", "amsgrad", "weight_decay", "maximize"), flags, strict=True))
    for flags in itertools.product((True, False), (False, True), (0.0, 0.01), (False, True))
]


@pytest.mark.parametrize(
    "flags", TORCH_FLAGS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items())
)
def test_matches_torch(device, flags):
    """Size of an update: lr / (1 - beta1^t) (|m| + |g|) / (sqrt(v) / sqrt(1 - beta2^t) + eps), as m
    may cancel.
    """
    lr, beta1, beta2, eps, steps = 0.01, 0.9, 0.99, 1e-8, 6
    mine = value_list([(1000,)], torch.float32, device)
    first, second = [torch.zeros_like(mine[0])], [torch.zeros_like(mine[0])]
    largest = [torch.zeros_like(mine[0])] if flags["amsgrad"] else []
    count = [torch.zeros((), device=device)]
    theirs = [p.clone().requires_grad_() for p in mine]
    options = {k: v for k, v in flags.items() if k != "decoupled"}
    kind = torch.optim.AdamW if flags["decoupled"] else torch.optim.Adam
    optimizer = kind(theirs, lr=lr, betas=(beta1, beta2), eps=eps, **options)
    size = torch.zeros_like(mine[0])
    for step in range(steps):
        grads = value_list([(1000,)], torch.float32, device)
        theirs[0].grad = grads[0].clone()
        size = torch.maximum(size, mine[0].abs())
        optimizer.step()
        functional.adamw_step_(
            mine,
            grads,
            first,
            second,
            count,
            largest,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decoupled=flags["decoupled"],
            weight_decay=flags["weight_decay"],
            maximize=flags["maximize"],
        )
        root = (largest or second)[0].sqrt() / math.sqrt(1 - beta2 ** (step + 1)) + eps
        update = lr / (1 - beta1 ** (step + 1)) * (first[0].abs() + grads[0].abs()) / root
        size = torch.maximum(size, torch.maximum(mine[0].abs(), update))
        error = (mine[0] - theirs[0].detach()).abs()
        bound = tolerances.optimizer_step(step + 1, size)
        assert (error <= bound).all(), float((error / bound).max())
    assert count[0].item() == steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """First step, betas 1/2 and 3/4, eps 0, g = 2: m = 0 + 1/2 2 = 1; v = 1/4 2^2 = 1.

    Update 1/4 (1 / (1 - 1/2)) / (sqrt(1) / sqrt(1 - 3/4)) = 1/4; decay 2 (1 - 1/4 1) = 3/2;
    together 5/4. Masked out g = 0 leaves m = v = 0, where eps 0 would give 0 / 0, so that one is
    frozen: 2.
    """
    p, m, v = (torch.full((2,), x, dtype=dtype, device=device) for x in (2.0, 0.0, 0.0))
    grad, step = (
        torch.tensor([2.0, 1e4], dtype=dtype, device=device),
        torch.zeros((), device=device),
    )
    functional.adamw_step_(
        [p],
        [grad],
        [m],
        [v],
        [step],
        lr=0.25,
        beta1=0.5,
        beta2=0.75,
        eps=0.0,
        weight_decay=1.0,
        masks=[torch.tensor([0b01], dtype=torch.uint8, device=device)],
        freeze_masked=True,
    )
    assert m.tolist() == [1.0, 0.0]
    assert v.tolist() == [1.0, 0.0]
    assert p.tolist() == [1.25, 2.0]
    assert step.item() == 1.0
