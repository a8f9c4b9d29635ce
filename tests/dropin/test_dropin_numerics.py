"""The drop-in checklist, section B: what a step computes, and what it leaves alone."""

import warnings

import pytest
import torch
from cases import shifted
from judging import assert_matches_reference, assert_same_bits
from models import (
    SHAPES,
    build,
    gradients,
    loader,
    masks,
    parameters,
    random_mask,
    run,
    same,
    values,
)
from paths import ROOT
from step_ops import adamw_case, sgd_case
from torch import nn

import sfron_fast as sf
from sfron_fast import Recipe, SaliencyMask, SFRonAdamW, SFRonSGD, functional
from sfron_fast.optim.rounding import rounding_check

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
OWN = {SFRonSGD: {"momentum": 0.9}, SFRonAdamW: {}}


# --- B1: the authors' update, written out with single torch operations ----------------------------


def authors_sgd(weights, grads, memory, selected, lr, max_norm):
    """mask, clip_grad_norm_, torch.optim.SGD(momentum=0.9, weight_decay=0.1): one optimizer serves
    both phases.
    """
    grads = clipped({n: torch.where(selected[n], g, 0.0) for n, g in grads.items()}, max_norm)
    for name, w in weights.items():
        g = grads[name] + w * 0.1
        memory[name] = g if name not in memory else memory[name] * 0.9 + g * 1.0
        weights[name] = w - memory[name] * lr


def authors_adamw(weights, grads, memory, selected, lr, max_norm):
    """mask, clip_grad_norm_, torch.optim.AdamW(weight_decay=0.1) with the bias corrections in lr
    and eps.
    """
    grads = clipped({n: torch.where(selected[n], g, 0.0) for n, g in grads.items()}, max_norm)
    for name, w in weights.items():
        g = grads[name]
        m, v, t = memory.get(name, (torch.zeros_like(w), torch.zeros_like(w), 0))
        m, v, t = m + (g - m) * (1.0 - 0.9), v * 0.999 + (g * (1.0 - 0.999)) * g, t + 1
        memory[name] = m, v, t
        root = (1.0 - power(0.999, t)) ** 0.5
        update = (m * (lr * root / (1.0 - power(0.9, t)))) / (
            v.double().sqrt().float() + 1e-8 * root
        )
        weights[name] = w * (1.0 - lr * 0.1) - update


def power(base, exponent):
    """By squaring: libraries' powers differ in the last bit."""
    half = power(base * base, exponent // 2) if exponent > 1 else 1.0
    return half * (base if exponent % 2 else 1.0)


def clipped(grads, max_norm):
    norm = sum((g.double() * g.double()).sum() for g in grads.values()).sqrt().float()
    factor = (torch.tensor(max_norm) / (norm + torch.tensor(1e-6))).clamp(max=1.0)
    return {n: g * factor for n, g in grads.items()}


@pytest.mark.checklist("B1")
@pytest.mark.parametrize(
    ("kind", "authors"), [(SFRonSGD, authors_sgd), (SFRonAdamW, authors_adamw)]
)
def test_gradient_semantics_have_the_bits_of_the_authors_update(kind, authors):
    params, selected, memory = parameters(torch.float32), masks(), {}
    every = {n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()}
    weights = values(params)
    optimizer = kind(
        params.items(),
        lr=0.05,
        weight_decay=0.1,
        max_norm=0.5,
        retain_steps=3,
        clip_retain=True,
        saliency=SaliencyMask.from_bool(selected),
        **OWN[kind],
    )
    for i, grads in enumerate(gradients(24, torch.float32)):
        forget = i % 4 == 0
        for name, param in params.items():
            param.grad = grads[name].clone()
        (optimizer.forget_step if forget else optimizer.step)()
        authors(weights, grads, memory, selected if forget else every, 0.05, 0.5)
        for name, param in params.items():
            assert_same_bits(param.detach(), weights[name], f"{name} after step {i}")


# --- B2, B3 ---------------------------------------------------------------------------------------


@pytest.mark.checklist("B2")
@BOTH
@pytest.mark.parametrize("moments", ["shared", "separate", "none"])
def test_forget_steps_alone_never_move_masked_weights(kind, moments):
    """With decay and momentum, from the first of twenty forget steps to the last."""
    params, selected = parameters(torch.float32), masks()
    start = values(params)
    optimizer = kind(
        params.items(),
        lr=0.1,
        weight_decay=0.1,
        mask_semantics="update",
        moments=moments,
        max_norm=1.0,
        saliency=SaliencyMask.from_bool(selected),
        **OWN[kind],
    )
    for grads in gradients(20, torch.float32):
        for name, param in params.items():
            param.grad = grads[name]
        optimizer.forget_step()
        optimizer.param_groups[0]["retain_pending"] = 0
    for name, param in params.items():
        kept = ~selected[name]
        assert_same_bits(param.detach()[kept], start[name][kept], name)
        assert (
            param[selected[name]].numel() == 0 or not (param == start[name])[selected[name]].any()
        )


@pytest.mark.checklist("B3")
@BOTH
def test_moments_are_shared_unless_told_and_the_docs_say_why(kind):
    assert kind(parameters().items()).param_groups[0]["moments"] == "shared"
    text = (ROOT / "docs/optimizers.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `moments`"))
    assert "\"shared\"` (the optimizers' default, authors' code)" in row
    assert '"separate"` (DualOptim)' in row
    with pytest.raises(ValueError, match="moments"):
        kind(parameters().items(), moments="dual")


# --- B6 -------------------------------------------------------------------------------------------


@pytest.mark.checklist("B6")
@BOTH
@pytest.mark.parametrize("slow_lr", [1.0, 0.5])
def test_calls_of_a_cycle(kind, slow_lr, monkeypatch):
    """One norm and one update for the forget step, one update for each retain step; a slow step
    rides in the last.
    """
    called = []

    def counted(name, function):
        def call(*lists, **rest):
            called.append((name, rest))
            return function(*lists, **rest)

        return call

    for name in ("masked_grad_norm", "sgd_step_", "adamw_step_", "interpolate_"):
        monkeypatch.setattr(functional, name, counted(name, getattr(functional, name)))
    params = parameters(torch.float32)
    optimizer = kind(params.items(), lr=0.1, slow_lr=slow_lr, retain_steps=2, **OWN[kind])
    run(optimizer, params, gradients(3, torch.float32), 2)
    update = "sgd_step_" if kind is SFRonSGD else "adamw_step_"
    assert [name for name, _ in called] == ["masked_grad_norm", update, update, update]
    slow = [
        (bool(k["slow_save"]) if "slow_save" in k else False, bool(k.get("slow_from")))
        for _, k in called[1:]
    ]
    assert slow == (
        [(False, False)] * 3 if slow_lr == 1.0 else [(True, False), (False, False), (False, True)]
    )
    assert ("slow" in optimizer.state[params["a"]]) == (slow_lr < 1.0)


@pytest.mark.checklist("B6")
def test_a_slow_step_of_zero_is_refused():
    """It would undo every cycle."""
    with pytest.raises(ValueError, match=r"slow_lr: expected a number in \(0.0, 1.0\], found 0.0"):
        SFRonSGD(parameters().items(), slow_lr=0.0)


# --- B7 -------------------------------------------------------------------------------------------


def large(tensor):
    return torch.cat([tensor.reshape(-1)] * 3001)  # so that two threads share it


@pytest.mark.checklist("B7")
@BOTH
def test_order_groups_and_threads_do_not_change_bits(kind, set_threads):
    """With a clip too: its norm is an fp64 sum that is rounded once."""
    results = []
    for groups, threads in (
        (["abcde"], 1),
        (["abcde"], 1),
        (["abcde"], 2),
        (["edcba"], 1),
        (["ab", "c", "de"], 2),
    ):
        set_threads(threads)
        params = {n: nn.Parameter(large(p.detach())) for n, p in parameters(torch.float32).items()}
        chosen = {n: torch.arange(p.numel()) % 3 > 0 for n, p in params.items()}
        optimizer = kind(
            [{"params": [(n, params[n]) for n in names]} for names in groups],
            lr=0.1,
            slow_lr=0.5,
            saliency=SaliencyMask.from_bool(chosen),
            max_norm=0.1,
            **OWN[kind],
        )
        for i, grads in enumerate(gradients(6, torch.float32)):
            for name, param in params.items():
                param.grad = large(grads[name])
            (optimizer.step if i % 2 else optimizer.forget_step)()
        results.append(values(params))
    assert all(same(results[0], other) for other in results[1:])


# --- B8 -------------------------------------------------------------------------------------------


@pytest.mark.checklist("B8")
@pytest.mark.parametrize("numel", [1, 2, 3, 127, 4097, 65_537, 1_000_003])
@pytest.mark.parametrize("misaligned", [False, True])
def test_kernels_have_the_references_bits_from_one_to_a_million_elements(numel, misaligned):
    flags = {
        "masked": True,
        "weight_decay": 0.1,
        "freeze_masked": True,
        "norm": 5.0,
        "max_norm": 1.0,
        "slow_save": True,
    }
    for name, make in (("sgd_step_", sgd_case), ("adamw_step_", adamw_case)):
        more = {"momentum": 0.9, "nesterov": True} if make is sgd_case else {}
        case = make([(numel,)], torch.float32, special=True, **flags, **more)
        case = case.map(shifted) if misaligned else case
        assert_matches_reference(name, case, getattr(functional, name))


# --- B9 -------------------------------------------------------------------------------------------


@pytest.mark.checklist("B9")
def test_low_precision_updates_are_computed_in_fp32_and_rounded_once():
    """Momentum, gradient and decay of half a bf16 step below 1 each: one by one they vanish,
    together they move it.
    """
    p, g, m = (torch.full((64,), x, dtype=torch.bfloat16) for x in (1.0, 2.0**-9, 2.0**-8))
    functional.sgd_step_([p], [g], [m], lr=1.0, momentum=0.5, weight_decay=2.0**-9)
    assert p.tolist() == [torch.tensor(1.0 - 3 * 2.0**-9).bfloat16().item()] * 64
    narrow, term = torch.tensor(1.0).bfloat16(), torch.tensor(2.0**-9).bfloat16()
    assert narrow - term - term - term == 1.0 != p[0]


def low(lr, dtype=torch.bfloat16, kind=SFRonAdamW, **settings):
    params = {n: p for n, p in parameters(dtype).items() if p.numel() > 1}
    chosen = {n: masks()[n] for n in params}
    optimizer = kind(
        params.items(), lr=lr, weight_decay=0.0, saliency=SaliencyMask.from_bool(chosen), **settings
    )
    for n, grad in gradients(1, dtype)[0].items():
        if n in params:
            params[n].grad = grad
    return optimizer


@pytest.mark.checklist("B9")
@pytest.mark.parametrize("phase", ["forget", "retain"])
def test_updates_that_round_to_nothing_are_told(phase):
    for lr, dtype, told in (
        (1e-6, torch.bfloat16, True),
        (1e-2, torch.bfloat16, False),
        (1e-6, torch.float32, False),
        (1e-6, torch.float16, True),
    ):
        optimizer = low(lr, dtype)
        step = optimizer.forget_step if phase == "forget" else optimizer.step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with rounding_check(optimizer):
                step()
        found = [str(w.message) for w in caught if "round to nothing" in str(w.message)]
        assert len(found) == told, (lr, dtype)
        assert all(f"in a {phase} step" in text for text in found)


@pytest.mark.checklist("B9")
def test_a_skipped_step_is_not_told_as_rounded(recwarn):
    optimizer = low(1e-6, max_norm=1.0)
    optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
    with rounding_check(optimizer):
        optimizer.forget_step()
    assert optimizer.skipped_steps == 1
    assert not [w for w in recwarn if "round to nothing" in str(w.message)]


@pytest.mark.checklist("B9")
def test_unlearn_tells_of_updates_that_round_to_nothing():
    model = build(dtype=torch.bfloat16)
    batches = [(x.bfloat16(), y) for x, y in loader(8, 4)]
    recipe = Recipe.paper(cycles=2, retain_steps=1, lr=1e-7, forget_lr=1e-7)
    with pytest.warns(
        RuntimeWarning, match="updates round to nothing: of .* moved in a forget step"
    ):
        sf.unlearn(model, retain=batches, forget=batches, recipe=recipe, mask=random_mask(model))
