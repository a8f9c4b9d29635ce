"""Short unlearning runs over every kind of loader, and runs that die at a checkpoint."""

import random

import numpy as np
import pytest
import torch
from models import bits, build, data
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import sfron_fast as sf
from sfron_fast import Recipe
from sfron_fast.runs.folder import save_whole

CYCLES, INNER = 3, 2
TOTAL = CYCLES * (1 + INNER)
RECIPES = {
    "paper": Recipe.paper(cycles=CYCLES, retain_steps=INNER, lr=0.05, forget_lr=0.2),
    "official": Recipe.official(cycles=CYCLES, retain_steps=INNER, lr=0.05, slow_lr=0.7),
    "adamw": Recipe.official(
        cycles=CYCLES,
        retain_steps=INNER,
        lr=0.01,
        optimizer="adamw",
        moments="separate",
        slow_lr=0.5,
    ),
}
EACH_RECIPE = pytest.mark.parametrize("name", list(RECIPES))


class Stop(Exception):
    pass


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Noisy(TensorDataset):
    """Augmentation from every global generator a data set may use."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.1 * torch.randn(x.shape) + 0.1 * np.random.randn() + 0.1 * random.random(), y


def loaders(kind):
    """retain and forget; passes of 3 and 2 batches, so that places lie in second passes too."""
    (xr, yr), (xf, yf) = data(10, seed=5), data(6, seed=6)
    retain, forget = TensorDataset(xr, yr), TensorDataset(xf, yf)
    if kind == "global":
        return DataLoader(retain, 4, shuffle=True), DataLoader(forget, 4, shuffle=True)
    if kind == "own":
        return (
            DataLoader(retain, 4, shuffle=True, generator=generator(7)),
            DataLoader(forget, 4, shuffle=True, generator=generator(8)),
        )
    if kind == "shared":
        g = generator(9)
        return DataLoader(retain, 4, shuffle=True, generator=g), DataLoader(
            forget, 4, shuffle=True, generator=g
        )
    if kind == "sampler":  # generators the loader itself does not show
        return (
            DataLoader(
                retain, 4, sampler=RandomSampler(retain, replacement=True, generator=generator(7))
            ),
            DataLoader(
                forget,
                batch_sampler=BatchSampler(RandomSampler(forget, generator=generator(8)), 4, False),
            ),
        )
    return DataLoader(Noisy(xr, yr), 4, shuffle=True), DataLoader(Noisy(xf, yf), 4, shuffle=True)


def run(recipe, kind, folder=None, stop=None, model="dropout", **settings):
    """A whole run, or one that dies right after the checkpoint at step ``stop``."""
    model = build(model) if isinstance(model, str) else model
    retain, forget = loaders(kind)
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    settings = {"recipe": recipe, "checkpoint": folder, "checkpoint_every": 1, **settings}
    if stop is None:
        return sf.unlearn(model, retain=retain, forget=forget, **settings)
    patch = pytest.MonkeyPatch()

    def save_and_die(state, path):
        save_whole(state, path)
        if state["position"] == stop:
            raise Stop

    patch.setattr(sf.runs.run, "save_whole", save_and_die)
    try:
        with pytest.raises(Stop):
            sf.unlearn(model, retain=retain, forget=forget, **settings)
    finally:
        patch.undo()
    return None


def whole_run(recipe, kind, **settings):
    return bits(run(recipe, kind, **settings).model)
