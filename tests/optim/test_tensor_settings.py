"""lr, weight_decay and slow_lr from a tensor instead of plain: for CUDA graphs, on every device."""

import pytest
import torch

from sfron_fast.functional import adamw_step_, sgd_step_
from sfron_fast.ops import registry as ops

HYPER = (0.02, 0.1, 0.3)


def tensors(seed, device="cpu", sizes=(5, 64, 2049)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(device) for n in sizes]


def step(kind, device, plain, numbers):
    params, grads, slow = tensors(0, device), tensors(1, device), tensors(2, device)
    lr, weight_decay, slow_lr = plain
    common = {
        "lr": lr,
        "weight_decay": weight_decay,
        "slow_from": slow,
        "slow_lr": slow_lr,
        "numbers": numbers,
    }
    if kind == "sgd":
        sgd_step_(params, grads, momentum=0.9, momentum_buffers=tensors(3, device), **common)
    else:
        states = tensors(4, device), [t.abs() for t in tensors(5, device)]
        steps = [torch.full((), 7.0, device=device) for _ in params]
        adamw_step_(params, grads, *states, steps, decoupled=kind == "adamw", **common)
    return params


@pytest.mark.checklist("E3")
@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_tensor_overrides_numbers(kind, native, device, monkeypatch):
    if not native:
        monkeypatch.setattr(ops, "op", ops.default_kernel)
        monkeypatch.setattr("sfron_fast.ops.native._module", None)
        monkeypatch.setattr("sfron_fast.ops.native.warn_once", lambda: None)
    given = torch.tensor(HYPER, dtype=torch.float64, device=device)
    wanted = step(kind, device, HYPER, None)
    got = step(kind, device, (0.5, 0.0, 1.0), given)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (torch.tensor(HYPER), "numbers: expected dtype torch.float64"),
        (torch.tensor(HYPER[:2], dtype=torch.float64), r"numbers: expected shape \(3,\)"),
        (torch.tensor((-1.0, 0.0, 1.0), dtype=torch.float64), "lr: expected a number in"),
        (torch.tensor((1.0, 0.0, 2.0), dtype=torch.float64), "slow_lr: expected a number in"),
    ],
)
def test_rejects(kind, numbers, message):
    with pytest.raises((ValueError, RuntimeError), match=message):  # which of them depends on torch
        step(kind, "cpu", HYPER, numbers)
