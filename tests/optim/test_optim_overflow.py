"""Clipping, non-finite gradients and amp."""

import warnings

import pytest
import torch
from models import SHAPES, gradients, masks, parameters, run, same, values

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD
from sfron_fast.optim.skips import ENOUGH

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])


@pytest.mark.checklist("B4")
@pytest.mark.parametrize("clip_retain", [False, True])
def test_clip_is_mask_then_clip_grad_norm_then_step(clip_retain):
    ours, theirs, selected = parameters(torch.float32), parameters(torch.float32), masks()
    a = SFRonSGD(
        ours.items(),
        lr=0.5,
        saliency=SaliencyMask.from_bool(selected),
        max_norm=1.5,
        clip_retain=clip_retain,
    )
    b = torch.optim.SGD(theirs.values(), lr=0.5)
    for i, step in enumerate(gradients(6, torch.float32)):
        for name in SHAPES:
            ours[name].grad, theirs[name].grad = step[name].clone(), step[name].clone()
            if i % 2 == 0:
                theirs[name].grad *= selected[name]
        if i % 2 == 0 or clip_retain:
            norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.5)
            assert norm > 1.5
        (a.step if i % 2 else a.forget_step)()
        b.step()
        if i % 2 == 0 or clip_retain:
            torch.testing.assert_close(a.grad_norm, norm)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.checklist("B10")
@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("phase", ["forget", "retain"])
def test_non_finite_gradient_changes_nothing_but_the_count(kind, bad, phase):
    params, selected = (
        parameters(torch.float32),
        {n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()},
    )
    extra = {"momentum": 0.9} if kind is SFRonSGD else {}
    optimizer = kind(
        params.items(),
        weight_decay=0.1,
        saliency=SaliencyMask.from_bool(selected),
        slow_lr=0.5,
        retain_steps=3,
        max_norm=1.0,
        clip_retain=True,
        **extra,
    )
    run(optimizer, params, gradients(5 if phase == "retain" else 4, torch.float32), 3)
    before = {n: p.detach().clone() for n, p in params.items()}
    state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in params.items()}
    pending = optimizer.param_groups[0]["retain_pending"]
    for name, grad in gradients(1, torch.float32, seed=4)[0].items():
        params[name].grad = grad
    params["b"].grad[3] = bad
    (optimizer.step if phase == "retain" else optimizer.forget_step)()
    assert same(before, {n: p.detach() for n, p in params.items()})
    for name, p in params.items():
        for key, value in state[name].items():
            if key == "slow" and phase == "forget":
                value = before[name]  # the next cycle starts here
            assert torch.equal(optimizer.state[p][key], value), key
    assert optimizer.skipped_steps == 1
    assert optimizer.param_groups[0]["retain_pending"] == (pending - 1 if phase == "retain" else 3)
    assert optimizer.state_dict()["param_groups"][0]["skipped"] == 1
    assert optimizer.skipped_steps == 1


def forget(optimizer, params, value):
    for p in params.values():
        p.grad = torch.full_like(p, value)
    optimizer.forget_step()
    optimizer.param_groups[0]["retain_pending"] = 0


@pytest.mark.checklist("B10")
def test_a_run_that_does_nothing_says_so_once():
    """A model of NaN, say: every forget step is skipped.

    One that counts in between is enough to be quiet.
    """
    params = parameters(torch.float32)
    optimizer = SFRonSGD(params.items(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(5 * ENOUGH):
            forget(optimizer, params, 1.0 if i % ENOUGH == 3 else float("nan"))
        assert optimizer.skipped_steps == 5 * (ENOUGH - 1)
    before = values(params)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3 * ENOUGH):
            forget(optimizer, params, float("nan"))
            assert optimizer.skipped_steps > 0  # to ask does not reset what is watched
    assert [str(w.message).split(":")[0] for w in seen] == [
        f"the last {ENOUGH} steps changed nothing"
    ]
    assert same(values(params), before)
    assert optimizer.skipped_steps == 5 * (ENOUGH - 1) + 3 * ENOUGH


def test_a_loaded_run_brings_its_own_count_of_skips():
    params = parameters(torch.float32)
    saved = SFRonSGD(params.items()).state_dict()
    optimizer = SFRonSGD(params.items())
    forget(optimizer, params, float("inf"))
    optimizer.load_state_dict(saved)
    assert optimizer.skipped_steps == 0
    forget(optimizer, params, float("inf"))
    assert optimizer.skipped_steps == 1


def test_non_finite_gradient_of_a_masked_weight_is_no_overflow():
    params, selected = parameters(torch.float32), masks()
    optimizer = SFRonSGD(
        params.items(), lr=1.0, saliency=SaliencyMask.from_bool(selected), max_norm=1.0
    )
    for p in params.values():
        p.grad = torch.ones_like(p)
    params["a"].grad[~selected["a"]] = float("nan")
    before = params["a"].detach().clone()
    optimizer.forget_step()
    assert optimizer.skipped_steps == 0
    assert torch.isfinite(params["a"]).all()
    assert torch.equal(params["a"] != before, selected["a"])


@BOTH
def test_overflow_in_the_last_retain_step_still_closes_the_cycle(kind):
    """Skipped: the update. Done: the slow step, over what the other steps moved."""
    grads = gradients(3)
    params, theirs = parameters(), parameters()
    optimizer = kind(params.items(), slow_lr=0.5, retain_steps=2, clip_retain=True)
    grads[2]["b"][0] = float("nan")
    run(optimizer, params, grads, 2)
    stock = kind(theirs.items())
    run(stock, theirs, grads[:2], 2)
    assert not optimizer.mid_cycle
    for name, p in params.items():
        start = parameters()[name].detach()
        torch.testing.assert_close(
            p.detach(), start + 0.5 * (theirs[name].detach() - start), rtol=1e-14, atol=1e-15
        )


@pytest.mark.checklist("D2")
@BOTH
@pytest.mark.parametrize("method", ["step", "forget_step"])
def test_amp_attributes(kind, method):
    params, plain = parameters(torch.float32), parameters(torch.float32)
    optimizer, twin = kind(params.items(), max_norm=0.7), kind(plain.items(), max_norm=0.7)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for name, grad in gradients(1, torch.float32)[0].items():
        params[name].grad, plain[name].grad = grad * 1024, grad.clone()
    getattr(optimizer, method)()
    getattr(twin, method)()
    assert same(
        {n: p.detach() for n, p in params.items()}, {n: p.detach() for n, p in plain.items()}
    )
    assert not torch.equal(params["a"], parameters(torch.float32)["a"])
    optimizer.found_inf = torch.tensor([1.0])
    before = params["a"].detach().clone()
    optimizer.step()
    assert torch.equal(params["a"], before)
    assert optimizer.skipped_steps == 1


def test_grad_scaler_runs_it():
    params = parameters(torch.float32)
    optimizer = SFRonSGD(params.items(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = params["a"].detach().clone()
    scaler.scale(sum(p.sum() for p in params.values())).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(params["a"], before - 0.1)
    after = params["a"].detach().clone()
    scaler.scale(params["a"].sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert torch.equal(params["a"], after)
