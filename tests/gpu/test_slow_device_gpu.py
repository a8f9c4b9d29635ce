"""Slow weights in the host's memory, on a GPU: the same bits in less memory."""

import gc

import pytest
import torch
from judging import assert_same_bits
from torch import nn

import sfron_fast as sf
from sfron_fast.optim import elsewhere

SHAPES = [(512, 2048)] * 24 + [(7,), (64, 32, 3, 3)]
SLOW = 2 * 24 * 512 * 2048  # bytes


def run(inside, **settings):
    """What weights and slow weights are in mid-cycle and at the end; the peak; an optimizer."""
    gc.collect()
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s, device="cuda").bfloat16()) for s in SHAPES]
    optimizer = sf.SFRonAdamW(params, lr=1e-2, retain_steps=2, slow_lr=0.5, **settings)
    found = []
    torch.cuda.reset_peak_memory_stats()
    for i in range(9):
        if i % 3 and inside:
            with sf.step_in_backward(optimizer):
                sum((p * torch.randn_like(p)).float().sum() for p in params).backward()
            optimizer.step()
        else:
            for p in params:
                p.grad = torch.randn_like(p)
            (optimizer.step if i % 3 else optimizer.forget_step)()
            optimizer.zero_grad()
        if i == 6:
            state = optimizer.state_dict()["state"]
            found += [state[k]["slow"].clone().cpu() for k in range(len(params))]
    peak = torch.cuda.max_memory_allocated()
    return found + [p.detach().cpu() for p in params], peak, optimizer


@pytest.mark.parametrize("inside", [False, True], ids=["step", "in backward"])
@pytest.mark.parametrize("settings", [{}, {"weight_bits": 24, "state_dtype": torch.int8}])
def test_the_bits_in_less_memory(settings, inside, monkeypatch):
    monkeypatch.setattr(elsewhere, "PART", 1 << 20)
    here, most, optimizer = run(inside, **settings)
    del optimizer
    there, less, optimizer = run(inside, slow_device="cpu", **settings)
    for ours, theirs in zip(there, here, strict=True):
        assert_same_bits(ours, theirs)
    slow = next(iter(optimizer.state.values()))["slow"]
    assert slow.device.type == "cpu"
    assert slow.is_pinned()
    assert most - less > 0.8 * SLOW


def test_the_host_waits_for_nothing():
    """In a whole cycle, once state and rooms are made."""
    param = nn.Parameter(torch.randn(1024, 1024, device="cuda"))
    optimizer = sf.SFRonAdamW([param], slow_lr=0.5, slow_device="cpu")
    for i in range(6):
        param.grad = torch.randn_like(param)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        try:
            (optimizer.step if i % 2 else optimizer.forget_step)()
        finally:
            torch.cuda.set_sync_debug_mode("default")
