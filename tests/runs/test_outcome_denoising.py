"""Whether a diffusion model has forgotten is not told by losses of other draws."""

import copy
import warnings

import pytest
import torch
from denoisers import FEATURES, KEPT, NULL, denoiser, images

import sfron_fast as sf
from sfron_fast import Denoising, Memorise, Recipe, Relabel

SEEDS = range(8)
NOTHING = {"lr": 1e-9, "cycles": 4}


def trained(steps=400):
    """A denoiser that knows its classes."""
    model, one = denoiser(), Denoising(KEPT, null=NULL)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        adam.zero_grad()
        one.mean_loss(model, one.prepare(images(64), torch.device("cpu"), "retain")).backward()
        adam.step()
    return model


MODEL = trained()


def run(recipe, seed=0, **settings):
    task = Denoising(KEPT, null=NULL, seed=seed, **settings)
    sets = {"forget": [images(12, label=1)], "retain": [images(12, label=c) for c in (0, 2, 3)]}
    return sf.unlearn(copy.deepcopy(MODEL), **sets, recipe=recipe, task=task)


def profile():
    return sf.loss_profile(MODEL, [images(64)], task=Denoising(KEPT, null=NULL), bins=5)


ELSEWHERE = torch.full((4, FEATURES), 3.0)
KINDS = {
    "ascent": (Recipe.diffusion_ascent, {"reference": profile()}),
    "official": (Recipe.official_ddpm, {"reduction": "sum"}),
    "relabel": (Recipe.diffusion, {"instead": Relabel(2)}),
    "memorise": (Recipe.diffusion, {"instead": Memorise(ELSEWHERE)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_does_nothing_says_so_whatever_was_drawn(kind):
    make, settings = KINDS[kind]
    for seed in SEEDS:
        with pytest.warns(
            RuntimeWarning, match="the loss of the first forget batch, with the same"
        ):
            run(make(**NOTHING), seed, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_forgets_says_nothing_whatever_was_drawn(kind):
    make, settings = KINDS[kind]
    lr = {} if kind == "ascent" else {"lr": 2e-3, "cycles": 8}
    for seed in SEEDS:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            run(make(**{"draws": 1, **lr} if kind != "official" else lr), seed, **settings)


def test_the_look_leaves_no_trace():
    """What is drawn after it, and the buffers, are those of a run without it."""
    ends = []
    for looks in (True, False):
        model, one = copy.deepcopy(MODEL), Denoising(KEPT, null=NULL, instead=Relabel(2))
        if not looks:
            one.has = lambda name: name not in ("reseeded", "correct")
        recipe = Recipe.diffusion(cycles=3, draws=1)
        sets = {"forget": [images(12, label=1)], "retain": [images(24)]}
        sf.unlearn(model, **sets, recipe=recipe, task=one)
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
