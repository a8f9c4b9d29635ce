"""What the design promises of memory, counted: no temporaries, no slow copy at 1, a mask bit a weight."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import sfron_fast as sf

BOTH = pytest.mark.parametrize("kind", [sf.SFRonSGD, sf.SFRonAdamW])

SIZES = [(1000, 100), (100_000,), (7, 11)]
WEIGHTS = sum(torch.Size(s).numel() for s in SIZES)


def trainee(kind, slow_lr):
    torch.manual_seed(0)
    params = [(f"p{i}", nn.Parameter(torch.randn(s))) for i, s in enumerate(SIZES)]
    saliency = sf.SaliencyMask.from_bool({n: torch.rand_like(p) < 0.5 for n, p in params})
    extra = {"momentum": 0.9} if kind is sf.SFRonSGD else {"amsgrad": True}
    optimizer = kind(params, lr=0.1, saliency=saliency, max_norm=1.0, clip_retain=True, slow_lr=slow_lr, **extra)
    for _, p in params:
        p.grad = torch.randn_like(p)
    return optimizer


def allocated(run):
    """Bytes that torch's allocator gives out while ``run`` runs, freed ones not taken off."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return sum(e.self_cpu_memory_usage for e in seen.events() if e.self_cpu_memory_usage > 0)


@BOTH
@pytest.mark.parametrize("slow_lr", [1.0, 0.5])
def test_no_temporaries_after_the_first_cycle(kind, slow_lr):
    """The record table of a call and a few scalars, nothing that grows with the weights."""
    optimizer = trainee(kind, slow_lr)
    optimizer.forget_step()
    optimizer.step()
    for step in (optimizer.forget_step, optimizer.step):
        assert allocated(step) < 4096, step
    assert allocated(lambda: torch.randn(WEIGHTS)) >= 4 * WEIGHTS  # the count counts


@pytest.mark.checklist("B6")
@BOTH
def test_first_cycle_makes_the_state_and_nothing_else(kind):
    """fp32: momentum, or two moments and AMSGrad's maximum; a slow copy only below 1; mask bits once."""
    moments = 1 if kind is sf.SFRonSGD else 3
    for slow_lr, copies in ((1.0, moments), (0.5, moments + 1)):
        optimizer = trainee(kind, slow_lr)
        made = allocated(lambda optimizer=optimizer: (optimizer.forget_step(), optimizer.step()))
        wanted = 4 * copies * WEIGHTS + WEIGHTS // 8
        assert wanted <= made < 1.02 * wanted
        assert any("slow" in state for state in optimizer.state.values()) == (slow_lr < 1.0)


@pytest.mark.checklist("H2")
def test_a_mask_is_an_eighth_of_a_byte_a_weight():
    optimizer = trainee(sf.SFRonSGD, 1.0)
    sizes = [optimizer.saliency[name].numel() for name in optimizer.saliency]
    assert sizes == [(torch.Size(s).numel() + 7) // 8 for s in SIZES]
    assert all(optimizer.saliency[name].dtype == torch.uint8 for name in optimizer.saliency)
