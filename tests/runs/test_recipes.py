"""Both recipes against loops written from the algorithm's text, without the package's pieces."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import bits, build, forever, loader

import sfron_fast as sf
from sfron_fast import Recipe
from sfron_fast.methods import finetune, gradient_ascent


def literal_official(
    model, forget, retain, cycles, inner, *, lr, alpha, clip, momentum=0.9, decay=5e-4, lambd=0.5
):
    """The authors' classification code: sfron.py."""
    params = dict(model.named_parameters())
    fishers = []
    for batches in (forget, retain):
        model.eval()
        fisher = {n: torch.zeros_like(p) for n, p in params.items()}
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for n, p in params.items():
                fisher[n] += p.grad.detach() ** 2 / len(batches)
        fishers.append(fisher)
    mask = {n: (fishers[0][n] + 1e-15) / (fishers[1][n] + 1e-15) >= 1 for n in params}

    n_iters = cycles * inner
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_iters)
    forget_batches, retain_batches = forever(forget), forever(retain)
    model.train()
    for step in range(n_iters):
        if step % inner == 0:
            alpha_t = alpha * 0.5 * (1 + math.cos(math.pi * step / n_iters))
            x, y = next(forget_batches)
            model.zero_grad()
            per_sample = F.cross_entropy(model(x), y, reduction="none")
            weights = 1 / (per_sample.detach() ** lambd + 1e-15)
            weights = weights / weights.sum() * len(y)
            (-alpha_t * (weights * per_sample).mean()).backward()
            for n, p in params.items():
                p.grad *= mask[n]
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        x, y = next(retain_batches)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return mask


def literal_paper(
    model, forget, retain, cycles, inner, *, eta, beta, slow, lambd=0.5, gamma=1.0, mask=None
):
    """The paper's algorithm: equations 6 to 9, line by line.

    BatchNorm: forget batches leave no trace.
    """
    params = dict(model.named_parameters())
    if mask is None:
        fishers = []
        for batches in (forget, retain):
            model.eval()
            fisher, samples = {n: torch.zeros_like(p) for n, p in params.items()}, 0
            for x, y in batches:
                for i in range(len(y)):
                    model.zero_grad()
                    F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
                    samples += 1
                    for n, p in params.items():
                        fisher[n] += p.grad.detach() ** 2
            fishers.append({n: f / samples for n, f in fisher.items()})
        mask = {n: fishers[0][n] >= gamma * fishers[1][n] for n in params}

    forget_batches, retain_batches = forever(forget), forever(retain)
    model.train()
    for t in range(cycles):
        start = {n: p.detach().clone() for n, p in params.items()}
        statistics = {n: b.clone() for n, b in model.named_buffers()}
        x, y = next(forget_batches)
        model.zero_grad()
        per_sample = F.cross_entropy(model(x), y, reduction="none")
        powers = per_sample.detach() ** -lambd
        (-(1 - t / cycles) * (powers / powers.sum() * per_sample).sum()).backward()
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(statistics[n])
            for n, p in params.items():
                p -= beta * torch.where(mask[n], p.grad, 0)
        for _ in range(inner):
            x, y = next(retain_batches)
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p in params.values():
                    p -= eta * p.grad
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(start[n] + slow * (p - start[n]))
    return mask


def batches(dtype):
    """Short last batches in both, and fewer batches than a run draws."""
    return loader(11, 4, dtype, seed=5), loader(26, 8, dtype, seed=6)


def distance(a, b):
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a)


def compare(literal, recipe, kind, dtype, *, fp64_bound):
    """Same mask and same weights; in fp32 as near to the literal loop as that is to its own fp64
    run.
    """
    ours, theirs = build(kind, dtype), build(kind, dtype)
    mask = literal(theirs, *batches(dtype))
    result = sf.unlearn(ours, retain=batches(dtype)[1], forget=batches(dtype)[0], recipe=recipe)
    for name, selected in mask.items():
        assert torch.equal(result.mask.to_bool(name), selected)
    assert 0 < sum(result.mask.counts().values()) < sum(p.numel() for p in ours.parameters())
    assert distance(bits(theirs), bits(build(kind, dtype))) > 1e-3
    if dtype == torch.float64:
        bound = fp64_bound
    else:
        exact = build(kind, dtype).double()
        literal(exact, *batches(torch.float64))
        bound = 4 * max(distance(bits(theirs), bits(exact)), 2.0**-23)
    assert distance(bits(ours), bits(theirs)) <= bound


# fp64: the clip norm travels in fp32, so an active clip is exact to 2^-24 only
@pytest.mark.checklist("B1")
@pytest.mark.parametrize(
    ("clip", "bound"), [(1e6, 1e-12), (0.3, 1e-7)], ids=["unclipped", "clipped"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "bn"])
def test_official_is_the_authors_loop(kind, dtype, clip, bound):
    recipe = Recipe.official(cycles=6, retain_steps=3, lr=0.05, forget_weight=3.0, max_norm=clip)

    def literal(model, forget, retain):
        return literal_official(model, forget, retain, 6, 3, lr=0.05, alpha=3.0, clip=clip)

    compare(literal, recipe, kind, dtype, fp64_bound=bound)


def test_official_defaults_are_the_authors():
    r = Recipe.official()
    assert (r.momentum, r.weight_decay, r.max_norm, r.slow_lr, r.threshold, r.temperature) == (
        0.9,
        5e-4,
        7.0,
        1.0,
        1,
        0.5,
    )
    assert (r.moments, r.mask_semantics, r.forget_decay, r.lr_decay) == (
        "shared",
        "gradient",
        "cosine",
        "cosine",
    )
    assert r.forget_lr is None
    assert r.forget_updates_buffers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "bn"])
def test_paper_is_the_papers_loop(kind, dtype):
    recipe = Recipe.paper(cycles=6, retain_steps=3, lr=0.05, forget_lr=0.4, slow_lr=0.6)

    def literal(model, forget, retain):
        return literal_paper(model, forget, retain, 6, 3, eta=0.05, beta=0.4, slow=0.6)

    compare(literal, recipe, kind, dtype, fp64_bound=1e-12)


def test_paper_defaults():
    r = Recipe.paper()
    assert (r.momentum, r.weight_decay, r.max_norm, r.moments, r.estimator) == (
        0.0,
        0.0,
        None,
        "none",
        "sample",
    )
    assert (r.forget_decay, r.lr_decay, r.forget_updates_buffers) == ("linear", "constant", False)


def test_adamw_recipe_is_torchs_adamw():
    # Adam makes much of a 1e-17 gradient
    ours, theirs = build("plain", torch.float64), build("plain", torch.float64)
    forget, retain = batches(torch.float64)
    everything = sf.SaliencyMask.from_bool(
        {n: torch.ones(p.shape) for n, p in ours.named_parameters()}
    )
    recipe = Recipe.official(
        optimizer="adamw", cycles=5, retain_steps=2, lr=0.01, forget_weight=2.0, max_norm=1e6
    )
    sf.unlearn(ours, retain=retain, forget=forget, recipe=recipe, mask=everything)

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    forget_batches, retain_batches = forever(forget), forever(retain)
    for t in range(5):
        x, y = next(forget_batches)
        theirs.zero_grad()
        per_sample = F.cross_entropy(theirs(x), y, reduction="none")
        weights = per_sample.detach() ** -0.5
        (
            -2.0
            * 0.5
            * (1 + math.cos(math.pi * t / 5))
            * (weights * per_sample).sum()
            / weights.sum()
        ).backward()
        optimizer.step()
        for _ in range(2):
            x, y = next(retain_batches)
            theirs.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            optimizer.step()
            schedule.step()
    assert distance(bits(ours), bits(theirs)) < 1e-12


@pytest.mark.parametrize("inner", [1, 2, 5, 20])
def test_cycle_is_the_low_pass_filter_of_remaining_curvature(inner):
    """Spec 1.5: theta^r - theta = -beta (I - eta H)^T_in grad L^u, and alpha times that after the
    slow step.
    """
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    hessian = root @ root.T / 7
    theta = torch.randn(7, dtype=torch.float64, generator=generator)
    unlearn_gradient = torch.randn(7, dtype=torch.float64, generator=generator)
    beta, eta = 0.3, 0.2
    moved = (
        -beta
        * torch.matrix_power(torch.eye(7, dtype=torch.float64) - eta * hessian, inner)
        @ unlearn_gradient
    )
    for slow_lr in (1.0, 0.75, 0.25):
        weights = torch.nn.Parameter(theta.clone())
        optimizer = sf.SFRonSGD(
            [weights], lr=eta, forget_lr=beta, retain_steps=inner, slow_lr=slow_lr, moments="none"
        )
        weights.grad = unlearn_gradient.clone()
        optimizer.forget_step()
        for _ in range(inner):
            # minimum of the retain loss at theta
            weights.grad = hessian @ (weights.detach() - theta)
            optimizer.step()
        assert (weights.detach() - theta - slow_lr * moved).abs().max() < 1e-14
    assert moved.abs().max() > 1e-2


def test_overrides_and_replace():
    recipe = Recipe.paper(cycles=7).replace(slow_lr=0.25)
    assert (recipe.cycles, recipe.slow_lr, recipe.estimator) == (7, 0.25, "sample")
    with pytest.raises(ValueError, match=r"overrides: .*slow_lr.* found slow_rate"):
        Recipe.paper(slow_rate=0.5)


def test_how_numbers_are_held_is_the_optimizers_setting():
    model = build("plain").bfloat16()
    held = {"weight_bits": 24, "state_dtype": torch.int8, "slow_device": "cpu"}
    for optimizer in ("sgd", "adamw"):
        recipe = Recipe.paper(optimizer=optimizer, **held)
        group = recipe.make_optimizer(model, None).param_groups[0]
        assert {name: group[name] for name in held} == held
    for name, wrong in (("weight_bits", 16), ("state_dtype", "int8"), ("slow_device", "cuda")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Recipe.paper(**{name: wrong})


def test_weights_that_cannot_be_held_so_are_refused_before_the_fishers(monkeypatch):
    from sfron_fast.runs import run

    monkeypatch.setattr(run, "estimate_mask", lambda *args, **settings: pytest.fail("too late"))
    forget, retain = batches(torch.float32)
    recipe = Recipe.paper(weight_bits=24)
    with pytest.raises(ValueError, match=r"weight_bits: expected None beside .*float32"):
        sf.unlearn(build("plain"), forget=forget, retain=retain, recipe=recipe)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [8.0, 6.0, 4.0, 2.0]),
        ("constant", [8.0] * 4),
        ("cosine", [8.0, 4 + 2 * math.sqrt(2), 4.0, 4 - 2 * math.sqrt(2)]),
    ],
)
def test_forget_weight_course(decay, expected):
    recipe = Recipe.paper(cycles=4, forget_weight=8.0, forget_decay=decay)
    assert [recipe.forget_weight_at(c) for c in range(4)] == pytest.approx(expected, rel=1e-15)


def test_finetune_and_gradient_ascent_are_torchs_loops():
    for sign in (1, -1):
        ours, theirs = build("bn"), build("bn")
        batches = loader(20, 8)
        if sign == 1:
            finetune(ours, batches, epochs=3, lr=0.05)
            theirs.train()
        else:
            ours.train()
            gradient_ascent(ours, batches, epochs=3, lr=0.05, max_norm=0.2)
            assert ours.training
            theirs.eval()
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
        for _ in range(3):
            for x, y in batches:
                optimizer.zero_grad()
                (sign * F.cross_entropy(theirs(x), y)).backward()
                if sign == -1:
                    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.2)
                optimizer.step()
            if sign == 1:
                schedule.step()
        assert distance(bits(ours), bits(theirs)) == 0
        assert distance(bits(ours), bits(build("bn"))) > 1e-3
