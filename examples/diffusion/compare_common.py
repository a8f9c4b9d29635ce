"""What the arms of the comparison share: batches, the task, masks of a base model and a class."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sfron_fast as sf
from examples.systems.masks import at_random
from sfron_fast import methods
from sfron_fast.evaluation.diffusion import recognised, sample

from .denoisers import KEPT
from .digits import CLASSES, NULL, SHAPE, Digits, Judge

BATCH = 64
DRAWS = 8  # of the Fisher, a sample
FISHER_BATCH = 512  # samples of the Fisher do not depend on their batch, and large ones are faster
SAMPLING = {"steps": 20, "clamp": 1.0}
PER_CLASS = 46  # images judged


def task(seed: int, **settings: Any) -> sf.Denoising:
    """Of every arm."""
    return sf.Denoising(KEPT, null=NULL, seed=seed, **settings)


class Batches:
    """Shuffled batches of images and classes, another order each pass: one pass of them, or
    ``count`` batches.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, seed: int, count: int | None = None, size: int = BATCH
    ) -> None:
        self.images, self.labels, self.count, self.size = images, labels, count, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        while True:
            order = torch.randperm(len(self.labels), generator=self.generator)
            for rows in order.split(self.size):
                yield self.images[rows], self.labels[rows]
                done += 1
                if done == self.count:
                    return
            if self.count is None:
                return


class Setting:
    """A base model, the class it shall forget, and what several arms need: made by the first that
    asks, its CPU seconds charged to each.
    """

    def __init__(
        self, base: nn.Module, data: Digits, label: int, seed: int, judge: Judge | None = None
    ) -> None:
        self.base, self.data, self.label, self.seed, self.judge = base, data, label, seed, judge
        self.forget, self.retain = data.of(label), data.of(label, same=False)
        self.following = (label + 1) % CLASSES  # what the class is made to say
        self.charged = 0.0
        self.made: dict[str, tuple[Any, float]] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made once."""
        if name in self.made:
            self.charged += self.made[name][1]
        else:
            begun = time.process_time()
            self.made[name] = make(), time.process_time() - begun
        return self.made[name][0]

    def sets(self) -> dict[str, Batches]:
        """Both loaders, from their beginning."""
        return {
            "forget": Batches(*self.forget, self.seed),
            "retain": Batches(*self.retain, self.seed + 1),
        }

    def fishers(self, drawn: sf.Denoising) -> dict[str, Any]:
        """Of the forget set and of twice as many retain images, each in one batch: what is drawn is
        then the same for both, image by image, and its luck is in both sides of the ratio.
        """
        order = torch.Generator().manual_seed(self.seed)
        few = torch.randperm(len(self.retain[1]), generator=order)[: 2 * len(self.forget[1])]
        sides = {"forget": self.forget, "retain": tuple(part[few] for part in self.retain)}
        how: dict[str, Any] = {"task": drawn, "estimator": "sample", "draws": DRAWS}
        return {
            side: sf.estimate_fisher(self.base, Batches(*rows, 0, size=FISHER_BATCH), **how)
            for side, rows in sides.items()
        }

    def mask(self, threshold: float = 1.0) -> sf.SaliencyMask:
        """SFR-on's."""
        fishers = self.once("fishers", lambda: self.fishers(task(self.seed)))
        return sf.SaliencyMask.from_fisher(**fishers, threshold=threshold)

    def random_mask(self) -> sf.SaliencyMask:
        """As many weights of each parameter as SFR-on selects."""
        return at_random(self.mask(), self.seed)

    def gradient_mask(self) -> sf.SaliencyMask:
        """SalUn's."""
        return self.once(
            "gradients",
            lambda: methods.gradient_saliency(
                self.base, self.sets()["forget"], 0.5, task=task(self.seed)
            ),
        )

    def profile(self) -> Any:
        """What losses are relative to."""
        return self.once(
            "profile",
            lambda: sf.loss_profile(self.base, self.sets()["retain"], task=task(self.seed)),
        )

    def unlearn(
        self, model: nn.Module, recipe: sf.Recipe, mask: sf.SaliencyMask | None = None, **of: Any
    ) -> None:
        """``sf.unlearn`` of this class; ``of``: settings of the task, and ``on_cycle``."""
        watched = {k: of.pop(k) for k in ("on_cycle",) if k in of}
        recipe = recipe if mask is not None else recipe.without("saliency")
        sf.unlearn(
            model, **self.sets(), recipe=recipe, mask=mask, task=task(self.seed, **of), **watched
        )

    def fa(self, model: nn.Module) -> float:
        """Percent of the class's images, at guidance 1, that the judge takes for it."""
        assert self.judge is not None
        labels = torch.full((PER_CLASS,), self.label)
        images = sample(model, labels, task=task(0), shape=SHAPE, **SAMPLING)
        return 100.0 * float(recognised(self.judge, images, labels).double().mean())
