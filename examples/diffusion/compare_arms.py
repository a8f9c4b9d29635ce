"""Every way to forget a class that is compared, each a function that changes a copy of the base."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sfron_fast as sf
from sfron_fast import methods
from sfron_fast.evaluation.diffusion import recognised, sample

from .denoisers import KEPT
from .digits import CLASSES, NULL, SHAPE, Digits, Judge

BATCH = 64
PASSES = 48  # backward passes of every method, where its name says no other
DRAWS = 8  # of the Fisher, a sample
FISHER_BATCH = 512  # samples of the Fisher do not depend on their batch, and large ones are faster
SAMPLING = {"steps": 20, "clamp": 1.0}
PER_CLASS = 46  # images judged
FORGOTTEN = 25.0  # FA at which gradient ascent stops
AVERAGED = 0.9999


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
        draw = torch.Generator().manual_seed(self.seed)
        mask, masks = self.mask(), {}
        for name, count in mask.counts().items():
            flat = torch.zeros(mask.size(name), dtype=torch.bool)
            flat[torch.randperm(len(flat), generator=draw)[:count]] = True
            masks[name] = flat.view(mask.shapes[name])
        return sf.SaliencyMask.from_bool(masks)

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


Settings = Mapping[str, Any]  # of a recipe; of fine-tuning and gradient ascent "lr"
# changes the model in place, or returns another to judge
Arm = Callable[[nn.Module, Setting, Settings], nn.Module | None]
Masked = Callable[[Setting], sf.SaliencyMask] | None


def relabelled(chosen: Settings, passes: int | None = None, **settings: Any) -> sf.Recipe:
    return sf.Recipe.diffusion(**chosen, cycles=(passes or PASSES) // 2, **settings)


def relabel(
    model: nn.Module,
    setting: Setting,
    chosen: Settings,
    *,
    passes: int | None = None,
    mask: Masked = Setting.mask,
    **of: Any,
) -> None:
    """To the next class."""
    selected = None if mask is None else mask(setting)
    instead = sf.Relabel(setting.following)
    setting.unlearn(model, relabelled(chosen, passes, **of), selected, instead=instead)


def ascent(
    model: nn.Module,
    setting: Setting,
    chosen: Settings,
    *,
    mask: Masked = Setting.mask,
    raw: bool = False,
    in_turn: bool = False,
    drop_forget: float = 0.0,
    **changed: Any,
) -> None:
    """Relative to what is usual at a timestep, up to three times that; ``raw``: neither.
    ``in_turn``: a forget and a retain step in turn, 72 passes in all.
    """
    selected = None if mask is None else mask(setting)
    recipe = sf.Recipe.diffusion_ascent(**{**chosen, **changed})
    recipe = recipe.replace(cycles=PASSES // (1 + recipe.retain_steps))
    recipe = recipe.without("fast_slow") if in_turn else recipe
    recipe = recipe.replace(ceiling=None) if raw else recipe
    reference = None if raw else setting.profile()
    setting.unlearn(model, recipe, selected, reference=reference, drop_forget=drop_forget)


def esd(model: nn.Module, setting: Setting, chosen: Settings) -> None:
    """Away from the condition, and retain steps, which ESD has not."""
    setting.unlearn(model, relabelled(chosen), instead=sf.Unconditional(copy.deepcopy(model)))


def dimum(model: nn.Module, setting: Setting, chosen: Settings, passes: int | None = None) -> None:
    """Images of the next class learnt under this one."""
    instead = sf.Memorise(setting.data.of(setting.following)[0])
    setting.unlearn(model, relabelled(chosen, passes), instead=instead)


def finetune(model: nn.Module, setting: Setting, chosen: Settings) -> None:
    """As many passes on the other classes alone."""
    few, one = Batches(*setting.retain, setting.seed + 1, PASSES), task(setting.seed)
    adam = {"optimizer": "adamw", "weight_decay": 0.0, "cosine": False}
    methods.finetune(model, few, task=one, epochs=1, lr=chosen["lr"], **adam)


def gradient_ascent(model: nn.Module, setting: Setting, chosen: Settings) -> nn.Module | None:
    """Until the class is forgotten; looking is not charged."""
    reached: list[nn.Module] = []

    def look(_: int, now: nn.Module) -> None:
        begun = time.process_time()
        if not reached and setting.fa(now) < FORGOTTEN:
            reached.append(copy.deepcopy(now))
        setting.charged -= time.process_time() - begun

    forget = setting.sets()["forget"]
    passes = -(-len(setting.forget[1]) // BATCH)
    adam: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0, "max_norm": 1.0}
    methods.gradient_ascent(
        model,
        forget,
        task=task(setting.seed),
        epochs=max(1, PASSES // passes),
        lr=chosen["lr"],
        on_epoch=look,
        **adam,
    )
    return reached[0] if reached else None


def averaged(model: nn.Module, setting: Setting, chosen: Settings) -> nn.Module:
    """Relabelling, of whose weights an average is used."""
    kept = copy.deepcopy(model)

    def follow(_: int, now: nn.Module) -> None:
        for average, p in zip(kept.parameters(), now.parameters(), strict=True):
            average.data.lerp_(p.detach(), 1.0 - AVERAGED)

    mask, instead = setting.mask(), sf.Relabel(setting.following)
    setting.unlearn(model, relabelled(chosen), mask, instead=instead, on_cycle=follow)
    return kept


class Noise(nn.Module):
    """Says that there is no noise, so images stay noise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return self.scale * x


def third(setting: Setting) -> sf.SaliencyMask:
    return setting.mask(3.0)


METHODS: dict[str, Arm] = {
    "SFR-on": relabel,
    "SFR-on, 16 passes": partial(relabel, passes=16),
    "SFR-on, ascent": ascent,
    "SalUn": partial(relabel, mask=Setting.gradient_mask, mask_semantics="update"),
    "DiMUM": dimum,
    "DiMUM, 600 passes": partial(dimum, passes=600),
    "ESD": esd,
    "fine-tuning": finetune,
    "gradient ascent": gradient_ascent,
}
PARTS: dict[str, Arm] = {
    "ascent, no slow step": partial(ascent, slow_lr=1.0),
    "ascent, steps in turn": partial(ascent, in_turn=True),
    "ascent, no mask": partial(ascent, mask=None),
    "ascent, random mask": partial(ascent, mask=Setting.random_mask),
    "ascent, temperature 0": partial(ascent, temperature=0.0),
    "ascent, raw adaptive": partial(ascent, raw=True),
    "SFR-on, no mask": partial(relabel, mask=None),
    "SFR-on, random mask": partial(relabel, mask=Setting.random_mask),
}
CONTROLS: dict[str, Arm] = {
    "ascent, gamma 3": partial(ascent, mask=third),
    "ascent, unconditional only": partial(ascent, drop_forget=1.0),
    "SFR-on, EMA .9999": averaged,
    "gradient ascent, until forgotten": gradient_ascent,
    "noise": lambda model, setting, chosen: Noise(),
}
ARMS = METHODS | PARTS | CONTROLS
ATTACKED = ("Retrain", "SFR-on", "SFR-on, ascent", "ESD", "DiMUM, 600 passes")


# what was tried on the classes that settings are chosen on
def _rates(*rates: float, **more: Any) -> list[Settings]:
    return [{"lr": lr, **more} for lr in rates]


FALLING = {"lr_decay": "cosine"}
SHORT = _rates(5e-5, 1e-4, 2e-4, 4e-4) + _rates(1e-4, 2e-4, 4e-4, 8e-4, **FALLING)
LONG = _rates(1e-3, 2e-3, 4e-3, 8e-3) + _rates(2e-3, 4e-3, 8e-3, 16e-3, **FALLING)
FORMS = [
    *_rates(1e-3, 2e-3, 4e-3, retain_steps=1),
    *_rates(4e-3, 8e-3, retain_steps=5),
    *_rates(4e-3, 8e-3, slow_lr=0.25),
    *_rates(2e-3, 4e-3, ceiling=6.0),
    *_rates(4e-3, ceiling=2.0),
    *_rates(2e-3, 4e-3, forget_decay="constant"),
]
GRIDS: dict[str, list[Settings]] = {
    **dict.fromkeys(["SFR-on", "SalUn", "DiMUM", "ESD"], SHORT),
    "fine-tuning": _rates(5e-4, 1e-3, 2e-3),
    "gradient ascent": _rates(5e-5, 1e-4, 2e-4, 4e-4),
    "SFR-on, ascent": [*LONG, *FORMS],
    **dict.fromkeys([name for name in PARTS if "ascent" in name], LONG),
}
# those with the lowest score; of settings within a point of it, those nearest the recipe's, or the
# whole's of which an arm is a part. Fine-tuning goes on at the rate of the training's beginning.
CHOICE: dict[str, Settings] = {
    **{name: {"lr": 2e-4} for name in ("SFR-on", "SalUn", "DiMUM", "ESD")},
    **{f"ascent, {form}": {"lr": 4e-3} for form in ("no mask", "random mask", "temperature 0")},
    **{
        f"ascent, {form}": {"lr": 2e-3}
        for form in ("no slow step", "steps in turn", "raw adaptive")
    },
    "SFR-on, ascent": {"lr": 4e-3},
    "fine-tuning": {"lr": 1e-3},
    "gradient ascent": {"lr": 5e-5},
    "gradient ascent, until forgotten": {"lr": 2e-4},  # at 5e-5 the class stays
    "noise": {"lr": 0.0},
}


def settings(name: str) -> Settings:
    """Of an arm: its own, or those of the arm it is a form of."""
    if name in CHOICE:
        return CHOICE[name]
    kind = name.split(",")[0]
    return CHOICE["SFR-on, ascent" if kind == "ascent" else kind]


def said(chosen: Settings) -> str:
    """The learning rate, and what else differs from the recipe."""
    more = (f"{key} {value}" for key, value in chosen.items() if key != "lr")
    return ", ".join([f"{chosen['lr']:g}", *more])
