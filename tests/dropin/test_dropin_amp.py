"""Checklist D: torch.amp.GradScaler around forget and retain steps, on the CPU."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from models import SHAPES, bits, build, data, gradients, masks, parameters, random_mask, same
from paths import ROOT

import sfron_fast as sf
from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
SCALE = 1024.0  # a power of two: scaling and unscaling round nothing


def make(kind, params, **settings):
    own = {"momentum": 0.9} if kind is SFRonSGD else {}
    return kind(params.items(), lr=0.1, weight_decay=0.1, **own, **settings)


def scaler_of(scale=SCALE, growth_interval=1000):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    scaler.scale(torch.zeros(()))  # makes its tensors, as the first loss does
    return scaler


def put(params, grads, factor=1.0):
    for name, param in params.items():
        param.grad = None if grads[name] is None else grads[name] * factor


def weights(params):
    return {n: p.detach().clone() for n, p in params.items()}


def everything(optimizer, params):
    """Copies of what a step may change."""
    return (
        weights(params),
        {n: copy.deepcopy(dict(optimizer.state.get(p, {}))) for n, p in params.items()},
        [(g["retain_pending"], g["skipped"]) for g in optimizer.param_groups],
    )


def same_everything(a, b):
    return same(a[0], b[0]) and a[2] == b[2] and all(same(a[1][n], b[1][n]) for n in a[1])


@pytest.mark.checklist("D1")
@BOTH
def test_unscale_clip_step_equals_the_unscaled_run(kind):
    """Also with the user's own clip between ``unscale_`` and ``step``, which frameworks do."""
    assert not hasattr(make(kind, parameters(torch.float32)), "_step_supports_amp_scaling")
    scaled, plain = parameters(torch.float32), parameters(torch.float32)
    settings = {
        "saliency": SaliencyMask.from_bool(masks()),
        "max_norm": 1.5,
        "retain_steps": 2,
        "slow_lr": 0.5,
    }
    a, b, scaler = make(kind, scaled, **settings), make(kind, plain, **settings), scaler_of()
    for i, grads in enumerate(gradients(9, torch.float32)):
        put(scaled, grads, SCALE)
        put(plain, grads)
        phase = a if i % 3 else a.forget
        if i > 3:
            scaler.unscale_(phase)
            assert same(
                {n: p.grad for n, p in scaled.items()}, {n: p.grad for n, p in plain.items()}
            )
            for params in (scaled, plain):
                torch.nn.utils.clip_grad_norm_(params.values(), 3.0)
        scaler.step(phase)
        scaler.update()
        (b.step if i % 3 else b.forget_step)()
        assert same_everything(everything(a, scaled), everything(b, plain)), i
    assert not same(weights(scaled), weights(parameters(torch.float32)))


@pytest.mark.checklist("D3")
@BOTH
@pytest.mark.parametrize("phase", ["forget", "retain"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_skips_everything(kind, phase, bad):
    """Parameters, moments, slow weights, the phase and the counters; and the scale backs off."""
    params = parameters(torch.float32)
    optimizer = make(
        kind, params, saliency=SaliencyMask.from_bool(masks()), retain_steps=2, slow_lr=0.5
    )
    scaler = scaler_of()
    for i, grads in enumerate(gradients(4 if phase == "retain" else 3, torch.float32)):
        put(params, grads, SCALE)
        scaler.step(optimizer if i % 3 else optimizer.forget)
        scaler.update()
    before = everything(optimizer, params)
    put(params, gradients(1, torch.float32, seed=5)[0])
    params["e"].grad[2, 1] = bad
    scaler.step(optimizer if phase == "retain" else optimizer.forget)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert same_everything(everything(optimizer, params), before)
    assert optimizer.mid_cycle == (phase == "retain")
    assert optimizer.skipped_steps == 0  # the scaler never called it


def unlearn_in_mixed_precision(
    model, optimizer, scaler, forget_batches, retain_batches, forget_weight=0.5
):
    """The loop of docs/mixed-precision.md."""
    for xf, yf in forget_batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sf.adaptive_cross_entropy(model(xf), yf, temperature=0.5)
        scaler.scale(-forget_weight * loss).backward()
        scaler.step(optimizer.forget)
        scaler.update()
        while optimizer.mid_cycle:
            xr, yr = next(retain_batches)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(xr), yr)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def batches_of(samples, count, seed):
    inputs, targets = data(samples * count, seed=seed)
    return list(zip(inputs.split(samples), targets.split(samples), strict=True))


@pytest.mark.checklist("D5")
@BOTH
def test_two_phases_with_one_scaler(kind):
    """Without overflows the bits of the run without a scaler: the scale is a power of two."""
    results = []
    for enabled in (True, False):
        model = build("bn")
        optimizer = kind(
            model.named_parameters(),
            lr=0.05,
            saliency=random_mask(model),
            max_norm=1.0,
            retain_steps=2,
            slow_lr=0.5,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4, enabled=enabled)
        retain = batches_of(8, 8, seed=2)
        unlearn_in_mixed_precision(model, optimizer, scaler, batches_of(8, 4, seed=1), iter(retain))
        assert not optimizer.mid_cycle
        if enabled:
            assert scaler.get_scale() == 256.0 * 2**3  # one update() per public step: 12 of them
        results.append(bits(model))
    assert same(*results)
    assert not same(results[0], bits(build("bn")))


@pytest.mark.checklist("D5")
def test_a_skipped_step_is_made_up_for():
    """A skipped retain step is done again with the next batch; after a skipped forget step no cycle
    is open.
    """
    model = build()
    optimizer = SFRonSGD(model.named_parameters(), lr=0.05, retain_steps=2)
    scaler = scaler_of(scale=64.0)
    retain = batches_of(8, 9, seed=2)
    retain[1] = (retain[1][0] * float("inf"), retain[1][1])
    forget = batches_of(8, 3, seed=1)
    forget[1] = (forget[1][0] * float("inf"), forget[1][1])
    left = iter(retain)
    unlearn_in_mixed_precision(model, optimizer, scaler, forget, left)
    assert not optimizer.mid_cycle
    assert len(list(left)) == 9 - 5  # two cycles of 2, and one batch lost
    assert scaler.get_scale() == 64.0 / 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.checklist("D5")
@pytest.mark.checklist("D4")
def test_the_docs_show_the_loop_and_what_the_fused_path_hides():
    section = (ROOT / "docs/mixed-precision.md").read_text()
    for line in (
        "scaler.step(opt.forget)",
        "scaler.step(opt)",
        "while opt.mid_cycle",
        "scaler.update()",
    ):
        assert line in section, line
    assert section.count("scaler.update()") == 2
    assert re.search(r"`fused=True`[\s\S]*scheduler goes on \(also Accelerate's", section)


@pytest.mark.checklist("D2")
@BOTH
@pytest.mark.parametrize("method", ["forget", "step"])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("preset", [None, 4.0])
def test_fused_unscaling_honours_the_scalers_tensors(kind, method, unscaled, preset):
    """Opt-in; also after ``unscale_``, and with a scale the user has set: the product counts."""
    params, plain = parameters(torch.float32), parameters(torch.float32)
    optimizer, twin = make(kind, params, max_norm=0.7, fused=True), make(kind, plain, max_norm=0.7)
    scaler = scaler_of()
    for grads in gradients(3, torch.float32):
        put(params, grads, SCALE * (preset or 1.0))
        put(plain, grads)
        phase = optimizer if method == "step" else optimizer.forget
        if preset is not None:
            optimizer.grad_scale = torch.tensor(preset)
        if unscaled:
            scaler.unscale_(phase)
        kept = {n: p.grad.clone() for n, p in params.items()}
        scaler.step(phase)
        scaler.update()
        # the step itself writes no gradient
        assert same({n: p.grad for n, p in params.items()}, kept)
        (twin.step if method == "step" else twin.forget_step)()
        assert same(weights(params), weights(plain))
        for each in (optimizer, twin):
            each.param_groups[0]["retain_pending"] = 0
    assert not same(weights(params), weights(parameters(torch.float32)))


@pytest.mark.checklist("D2")
@BOTH
@pytest.mark.parametrize("method", ["forget", "step"])
def test_fused_overflow_is_skipped_on_the_device(kind, method, monkeypatch):
    """The host reads no value; weights and moments keep their bits, the skip is counted."""
    params = parameters(torch.float32)
    optimizer = make(kind, params, retain_steps=1, fused=True)
    scaler = scaler_of()
    put(params, gradients(1, torch.float32)[0], SCALE)
    scaler.step(optimizer)
    scaler.update()
    before = everything(optimizer, params)
    put(params, gradients(1, torch.float32, seed=3)[0])
    params["b"].grad[0] = float("inf")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", None)
        patch.setattr(torch.Tensor, "__bool__", None)
        patch.setattr(torch.Tensor, "tolist", None)
        scaler.step(optimizer if method == "step" else optimizer.forget)
    scaler.update()
    after = everything(optimizer, params)
    assert same(after[0], before[0])
    assert all(same(after[1][n], before[1][n]) for n in SHAPES)
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == SCALE / 2
    put(params, gradients(1, torch.float32, seed=4)[0], SCALE / 2)
    scaler.step(optimizer)  # and on it goes
    assert not same(weights(params), before[0])


@BOTH
@pytest.mark.parametrize("phase", ["forget", "retain"])
def test_a_disabled_scaler_hands_a_closure_on(kind, phase):
    """One loop for fp32 and fp16 alike, with an optimizer that calls its closure."""
    params, plain = parameters(torch.float32), parameters(torch.float32)
    optimizer, twin = make(kind, params), make(kind, plain)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params.values())
        loss.backward()
        return loss

    found = scaler.step(optimizer.forget if phase == "forget" else optimizer, closure)
    assert float(found.detach()) == float(sum(p.square().sum() for p in plain.values()).detach())
    put(plain, {n: 2 * p.detach() for n, p in plain.items()})
    (twin.forget_step if phase == "forget" else twin.step)()
    assert same(weights(params), weights(plain))
    assert optimizer.mid_cycle == (phase == "forget")


def test_the_forget_phase_survives_copies_and_passes_everything_else_on():
    params = parameters(torch.float32)
    optimizer = SFRonSGD(params.items(), lr=0.1)
    twin = copy.deepcopy(optimizer)
    assert optimizer.forget is optimizer.forget
    assert twin.forget.param_groups is twin.param_groups
    assert optimizer.forget.param_groups is optimizer.param_groups
    optimizer.forget.found_inf = torch.ones(())
    assert optimizer.found_inf == 1
    del optimizer.forget.found_inf
    assert not hasattr(optimizer, "found_inf")
