"""Checklist lines that only a device proves: GradScaler without waiting, memory, reads a batch."""

import warnings

import pytest
import torch
from models import build, gradients, loader, masks, parameters, same, values
from torch import nn

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD, estimate_fisher

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


def training(kind, **settings):
    params = {n: nn.Parameter(p.detach().cuda()) for n, p in parameters(torch.float32).items()}
    own = {"momentum": 0.9} if kind is SFRonSGD else {}
    optimizer = kind(
        params.items(),
        lr=0.1,
        weight_decay=0.1,
        saliency=SaliencyMask.from_bool(masks()),
        max_norm=1.0,
        slow_lr=0.5,
        **own,
        **settings,
    )
    return optimizer, params


def put(params, grads, scale=1.0):
    for name, param in params.items():
        param.grad = grads[name].cuda() * scale


@pytest.mark.checklist("D2")
@BOTH
def test_a_fused_scaler_step_waits_for_nothing(kind):
    """An overflow too is skipped on the device; weights and moments keep their bits."""
    optimizer, params = training(kind, fused=True)
    plain, others = training(kind)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device="cuda"))
    for i, grads in enumerate(gradients(6, torch.float32)):
        put(params, grads, 1024.0)
        put(others, grads)
        torch.cuda.synchronize()
        # state and tables are made in the first cycle
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        try:
            scaler.step(optimizer if i % 2 else optimizer.forget)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        (plain.step if i % 2 else plain.forget_step)()
        assert same(values(params), values(others)), i
    before = values(params)
    put(params, gradients(1, torch.float32, seed=3)[0])
    params["a"].grad.fill_(float("inf"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.step(optimizer.forget)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(values(params), before)
    assert optimizer.skipped_steps == 1


@pytest.mark.checklist("E4")
@BOTH
def test_a_cycle_allocates_nothing_after_the_first(kind):
    optimizer, params = training(kind, clip_retain=True)
    put(params, gradients(1, torch.float32)[0])
    for _ in range(2):
        optimizer.forget_step()
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(5):
        optimizer.forget_step()
        optimizer.step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert after["allocated_bytes.all.current"] == before["allocated_bytes.all.current"]
    small = 1024 * len(params)  # the norm, and copies of scalars
    assert (
        after["allocated_bytes.all.allocated"] - before["allocated_bytes.all.allocated"]
        <= 10 * small
    )


@pytest.mark.checklist("H4")
@pytest.mark.parametrize("estimator", ["batch", "batch_equal"])
def test_an_estimate_waits_as_often_for_nine_batches_as_for_three(estimator):
    model, waits = build().cuda(), []
    for samples in (12, 36):
        batches = [(x.cuda(), y.cuda()) for x, y in loader(samples, 4)]
        estimate_fisher(model, batches[:1], estimator=estimator)  # libraries start up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                estimate_fisher(model, batches, estimator=estimator)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(w.message) for w in caught))
    assert waits[0] == waits[1]
