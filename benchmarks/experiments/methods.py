"""The table's rows: how each method runs on a split, timed without the looks on the way."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.cases.models import ResNet18
from sfron_fast import Recipe, SaliencyMask, unlearn
from sfron_fast import methods as published
from sfron_fast.runs.stopwatch import Stopwatch

from .data import CLASSES, Batches, Split
from .settings import Scale

Look = Callable[[nn.Module], None]
LOOKS = 5  # points on a method's way


class MixedPrecision(nn.Module):
    """A model that trains in bf16.

    Its weights, gradients and logits are fp32, and so is all it does in eval mode.

    Activations are channels-last, as tensor cores want them; weights and gradients stay contiguous,
    as the kernels do.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [batch, classes]."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.training):
            return self.model(inputs.contiguous(memory_format=torch.channels_last)).float()


def make_model(scale: Scale, device: str) -> nn.Module:
    """An untrained ResNet-18 from the global generator."""
    model = ResNet18(CLASSES, scale.width).to(device)
    return MixedPrecision(model) if device == "cuda" else model


def train(scale: Scale, split_part: Any, seed: int, device: str) -> tuple[nn.Module, float]:
    """A model from scratch, and the seconds: SGD with Nesterov momentum, one cycle of lr."""
    torch.manual_seed(seed)
    model = make_model(scale, device)
    loader = Batches(split_part, scale.train_batch, train=True, crop=scale.crop)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=scale.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, scale.lr, total_steps=scale.epochs * len(loader), pct_start=0.25
    )
    with Stopwatch() as watch:
        model.train()
        for _ in range(scale.epochs):
            for inputs, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                schedule.step()
    return model, watch.seconds


@dataclass
class Task:
    """What a baseline is given: the model to change, and batches of every set it may ask for."""

    model: nn.Module
    split: Split
    scale: Scale
    device: str

    def batches(self, images: Any) -> Batches:
        """Training batches."""
        return Batches(images, self.scale.batch, train=True, crop=self.scale.crop)

    @property
    def retain(self) -> Batches:
        return self.batches(self.split.retain)

    @property
    def forget(self) -> Batches:
        return self.batches(self.split.forget)


BASELINES: dict[str, Callable[..., nn.Module]] = {
    "FT": lambda t, **s: published.finetune(t.model, t.retain, **s),
    "GA": lambda t, **s: published.gradient_ascent(t.model, t.forget, **s),
    "RL": lambda t, **s: published.random_label(t.model, t.batches(t.split.wrong()), **s),
    "SalUn": lambda t, **s: published.salun(
        t.model, forget=t.forget, mixed=t.batches(t.split.wrong()), **s
    ),
    "BT": lambda t, **s: published.bad_teacher(
        t.model, t.batches(t.split.marked()), make_model(t.scale, t.device), **s
    ),
    "SCRUB": lambda t, **s: published.scrub(t.model, retain=t.retain, forget=t.forget, **s),
    "SA": lambda t, **s: published.selective_amnesia(
        t.model, retain=t.retain, forget=t.forget, **s
    ),
}
PAPER, OFFICIAL, SEPARATE = "SFR-on (paper)", "SFR-on (official)", "SFR-on (separate)"
RECIPES: dict[str, Callable[..., Recipe]] = {
    PAPER: Recipe.paper,
    OFFICIAL: Recipe.official,
    SEPARATE: lambda **s: Recipe.official(**{"moments": "separate", **s}),
}
# name -> (recipe and settings of, the part it lacks)
ABLATIONS: dict[str, tuple[str, Any]] = {
    "paper, no S": (PAPER, "saliency"),
    "paper, no adaptive F": (PAPER, "adaptive"),
    "paper, no fast-slow": (PAPER, "fast_slow"),
}
TUNED = (*BASELINES, *RECIPES)
METHODS = (*TUNED, *ABLATIONS)


def owner(method: str) -> str:
    """The method whose settings this one runs with."""
    return ABLATIONS[method][0] if method in ABLATIONS else method


@dataclass
class Unlearned:
    """A method's model and what it took."""

    model: nn.Module
    seconds: float
    mask: SaliencyMask | None = None


def apply_method(
    method: str, settings: dict[str, Any], task: Task, look: Look = lambda model: None
) -> Unlearned:
    """Run a method on a copy of the task's model, with at most ``LOOKS`` looks, off the clock."""
    task = Task(copy.deepcopy(task.model), task.split, task.scale, task.device)
    if method in BASELINES:
        with Stopwatch() as watch:

            def on_epoch(_: int, model: nn.Module) -> None:
                with watch.pause():
                    look(model)

            BASELINES[method](task, **settings, on_epoch=on_epoch)
        return Unlearned(task.model, watch.seconds)
    recipe = RECIPES[owner(method)](**settings)
    if method in ABLATIONS:
        recipe = recipe.without(ABLATIONS[method][1])

    def on_cycle(cycle: int, model: nn.Module) -> None:
        if cycle % -(-recipe.cycles // LOOKS) == 0 or cycle == recipe.cycles:
            look(model)

    result = unlearn(
        task.model, retain=task.retain, forget=task.forget, recipe=recipe, on_cycle=on_cycle
    )
    return Unlearned(task.model, result.seconds, result.mask)
