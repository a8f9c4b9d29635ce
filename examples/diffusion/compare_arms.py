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
from sfron_fast.methods.descent import descend

from .compare_common import BATCH, Batches, Setting, task

PASSES = 48  # backward passes of every method, where its name says no other
FORGOTTEN = 25.0  # FA at which gradient ascent stops
AVERAGED = 0.9999

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


def esd_alone(model: nn.Module, setting: Setting, chosen: Settings) -> None:
    """As published: as many passes on the forget set alone."""
    one = task(setting.seed, instead=sf.Unconditional(copy.deepcopy(model)))
    few = Batches(*setting.forget, setting.seed, PASSES)

    def losses(_: int) -> Iterator[Tensor]:
        for batch in one.prepared(few, torch.device("cpu"), "forget"):
            yield one.replacement_losses(model, batch).mean()

    adam: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0, "cosine": False}
    descend(model, losses, epochs=1, lr=chosen["lr"], max_norm=1.0, **adam)


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
    "ascent, no mask, lr 2e-3": partial(ascent, mask=None),  # scored alike
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
    "ESD, no retain steps": esd_alone,
    "noise": lambda model, setting, chosen: Noise(),
}
ARMS = METHODS | PARTS | CONTROLS
ATTACKED = (
    "Retrain",
    "SFR-on",
    "SFR-on, ascent",
    "ESD",
    "DiMUM, 600 passes",
    "ESD, no retain steps",
)
