"""The recipes for diffusion models against their loops, written out; noise and timesteps are the
task's, all else is done here.
"""

import copy
import math

import pytest
import torch
from denoisers import FEATURES, KEPT, NULL, denoiser, images

import sfron_fast as sf
from sfron_fast import Denoising, Memorise, Recipe, Relabel, Unconditional

CPU = torch.device("cpu")
WIDE = torch.float64


def sets():
    """Forget and retain batches; fewer than a run draws."""
    forget = [images(5, WIDE, 11, label=1), images(3, WIDE, 12, label=1)]
    return forget, [images(6, WIDE, s) for s in (21, 22, 23)]


def task(**settings):
    return Denoising(KEPT, **{"null": NULL, **settings})


def forever(batches, one, name):
    while True:
        for batch in batches:
            yield one.prepare(batch, CPU, name)


def said(model, x0, batch, condition):
    """The model's prediction on ``x0`` noised as the batch says."""
    kept = KEPT[batch["t"]].unsqueeze(1)
    noisy = kept.sqrt() * x0 + (1 - kept).sqrt() * batch["noise"].double()
    return model(noisy, batch["t"], class_labels=condition)


def errors(model, batch, total):
    """Each sample's squared error of the noise."""
    each = (said(model, batch["x0"], batch, batch["condition"]) - batch["noise"].double()) ** 2
    return each.sum(1) if total else each.mean(1)


def literal_mask(model, batches, settings, *, draws, by_sample, total=False):
    """F_forget + 1e-15 >= F_retain + 1e-15, of samples or of batches that count alike; weights that
    neither reaches are selected by the authors only.
    """
    params = dict(model.named_parameters())
    fishers = []
    for name, loader in zip(("forget", "retain"), batches, strict=True):
        one = task(**settings)
        fisher, count = {n: torch.zeros_like(p) for n, p in params.items()}, 0
        with one.estimating(0, 1):
            for batch in loader:
                for _ in range(draws):
                    each = errors(model, one.prepare(batch, CPU, name), total)
                    for loss in each if by_sample else [each.mean()]:
                        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
                        count += 1
                        for n, g in zip(params, grads, strict=True):
                            fisher[n] += g**2
        fishers.append({n: f / count for n, f in fisher.items()})
    forget, retain = fishers
    found = {n: forget[n] + 1e-15 >= retain[n] + 1e-15 for n in params}
    if by_sample:
        found = {n: m & ((forget[n] != 0) | (retain[n] != 0)) for n, m in found.items()}
    return found


def literal_run(model, recipe, settings, forget_loss, *, total=False, mask):
    """Adam for both phases: a forget step by ``forget_loss`` within the mask, retain steps, and
    what is gone of the way is multiplied by the slow rate.
    """
    one, (forget, retain) = task(**settings), sets()
    forget_batches = forever(forget, one, "forget")
    retain_batches = forever(retain, one, "retain")
    params = dict(model.named_parameters())
    adam = torch.optim.Adam(params.values(), lr=recipe.lr)
    for cycle in range(recipe.cycles):
        start = {n: p.detach().clone() for n, p in params.items()}
        adam.zero_grad(set_to_none=False)
        forget_loss(model, next(forget_batches), cycle).backward()
        for n, p in params.items():
            p.grad = torch.where(mask[n], torch.zeros_like(p) if p.grad is None else p.grad, 0)
        if recipe.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), recipe.max_norm)
        adam.step()
        for _ in range(recipe.retain_steps):
            adam.zero_grad(set_to_none=False)
            errors(model, next(retain_batches), total).mean().backward()
            if recipe.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(params.values(), recipe.max_norm)
            adam.step()
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(start[n] + recipe.slow_lr * (p - start[n]))


def compare(recipe, settings, forget_loss, *, total=False, draws=1, by_sample=True):
    """The same mask, and the same weights within what a clip's norm in fp32 leaves."""
    ours, theirs = denoiser(WIDE), denoiser(WIDE)
    if callable(settings):
        settings = settings(ours)
    kinds = {"draws": draws, "by_sample": by_sample, "total": total}
    plain = {k: v for k, v in settings.items() if k in ("drop", "drop_forget")}
    mask = literal_mask(theirs, sets(), plain, **kinds)
    before = copy.deepcopy(theirs.state_dict())
    literal_run(theirs, recipe, plain_settings(settings), forget_loss, total=total, mask=mask)
    forget, retain = sets()
    result = sf.unlearn(ours, forget=forget, retain=retain, recipe=recipe, task=task(**settings))
    for name, selected in mask.items():
        assert torch.equal(result.mask.to_bool(name), selected), name
    moved = 0.0
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6), (name, (a - b).abs().max())
        moved = max(moved, float((b - before[name]).abs().max()))
    assert moved > 1e-3
    return result


def plain_settings(settings):
    """What decides about draws; ``instead`` draws its own."""
    return {k: v for k, v in settings.items() if k in ("drop", "drop_forget", "instead")}


def test_official_ddpm_is_the_authors_loop():
    recipe = Recipe.official_ddpm(cycles=7, lr=3e-3)

    def ascend(model, batch, cycle):
        losses = errors(model, batch, total=True)
        weights = losses.detach() ** -0.5
        alpha = 10.0 * 0.5 * (1 + math.cos(math.pi * cycle / 7))
        return -alpha * (weights / weights.sum() * losses).sum()

    settings = {"reduction": "sum", "drop": 0.1, "drop_forget": 0.1}
    compare(recipe, settings, ascend, total=True, by_sample=False)


def test_official_sd_is_the_authors_loop_with_its_mask():
    def to_the_other(model, batch, _):
        own = said(model, batch["x0"], batch, batch["condition"])
        with torch.no_grad():
            other = said(model, batch["x0"], batch, torch.full_like(batch["condition"], 2))
        return ((own - other) ** 2).mean()

    recipe = Recipe.official_sd(cycles=7, lr=3e-3)
    compare(recipe, {"instead": Relabel(2)}, to_the_other, by_sample=False)


def test_diffusion_relabels_by_a_mapping():
    def to_the_next(model, batch, _):
        own = said(model, batch["x0"], batch, batch["condition"])
        with torch.no_grad():
            other = said(model, batch["x0"], batch, batch["condition"] + 1)
        return ((own - other) ** 2).mean()

    recipe = Recipe.diffusion(cycles=5, lr=3e-3, draws=2)
    compare(recipe, {"instead": Relabel({1: 2})}, to_the_next, draws=2)


def test_diffusion_away_from_the_condition():
    frozen = denoiser(WIDE)

    def away(model, batch, _):
        with torch.no_grad():
            own = said(frozen, batch["x0"], batch, batch["condition"])
            plain = said(frozen, batch["x0"], batch, torch.full_like(batch["condition"], NULL))
        wanted = plain - 1.5 * (own - plain)
        return ((said(model, batch["x0"], batch, batch["condition"]) - wanted) ** 2).mean()

    recipe = Recipe.diffusion(cycles=5, lr=3e-3, draws=1)
    compare(recipe, {"instead": Unconditional(denoiser(WIDE), 1.5)}, away)


def test_diffusion_memorises_alternatives():
    alternatives = torch.randn(9, FEATURES, dtype=WIDE, generator=torch.Generator().manual_seed(4))
    used = set()

    def memorise(model, batch, _):
        x0 = batch["alternative"]
        places = [int((alternatives == row).all(1).nonzero()) for row in x0]
        used.update(places)
        found = said(model, alternatives[places], batch, batch["condition"])
        return ((found - batch["noise"].double()) ** 2).mean()

    recipe = Recipe.diffusion(cycles=5, lr=3e-3, draws=1)
    compare(recipe, {"instead": Memorise(alternatives)}, memorise)
    assert len(used) > 4


@pytest.mark.parametrize("ceiling", [1.2, 1000.0])
def test_diffusion_ascent_is_relative_to_the_profile_and_ends_at_the_ceiling(ceiling):
    model = denoiser(WIDE)
    profile = sf.loss_profile(model, sets()[1], task=task(), bins=5)

    def ascend(model, batch, cycle):
        losses = errors(model, batch, total=False)
        usual = profile.losses[batch["t"] * 5 // 50].double()
        relative = losses / usual
        weights = relative.detach() ** -0.5
        weights = weights / weights.sum()
        weights = torch.where(relative.detach() >= ceiling, 0.0, weights)
        return -(1 - cycle / 6) * (weights * relative).sum()

    recipe = Recipe.diffusion_ascent(cycles=6, draws=1, ceiling=ceiling, lr=2e-3)
    result = compare(recipe, {"reference": profile}, ascend)
    assert result.forgotten_steps == 0


def test_a_step_whose_samples_are_all_at_the_ceiling_is_skipped():
    model = denoiser(WIDE)
    profile = sf.loss_profile(model, sets()[1], task=task(), bins=5)
    forget, retain = sets()
    recipe = Recipe.diffusion_ascent(cycles=3, draws=1, ceiling=1e-3)
    with pytest.warns(RuntimeWarning, match="at the ceiling"):
        result = sf.unlearn(
            model, forget=forget, retain=retain, recipe=recipe, task=task(reference=profile)
        )
    assert result.forgotten_steps == 3


def test_refusals():
    forget, retain = sets()
    rest = {"forget": forget, "retain": retain}
    with pytest.raises(ValueError, match="instead: expected Relabel, Unconditional, Memorise or"):
        sf.unlearn(denoiser(), **rest, recipe=Recipe.diffusion(), task=task())
    with pytest.raises(ValueError, match=r"replacement_losses\(\)"):
        sf.unlearn(torch.nn.Linear(6, 3), **rest, recipe=Recipe.diffusion())
    with pytest.raises(ValueError, match="holdout"):
        sf.unlearn(denoiser(), **rest, recipe=Recipe.diffusion_ascent(), task=task())
    with pytest.raises(ValueError, match=r"^ceiling"):
        Recipe.diffusion(ceiling=2.0)
    with pytest.raises(ValueError, match=r"^draws"):
        Recipe.official_ddpm(draws=4)
    with pytest.raises(ValueError, match=r"^objective"):
        Recipe.paper(objective="descent")
