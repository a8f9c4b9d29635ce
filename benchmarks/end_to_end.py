"""Whole unlearning cycles on real models, phase by phase: what a faster step is worth in a run.

A cycle is a forget step and retain steps, the last with a slow interpolation; the Fisher and mask
stage is measured beside it. Every arm trains its own copy of one model on the same batches, and all
must arrive at the same weights and masks.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases.loops import Authors, Ours, Phases, Published, Stock
from .cases.models import Decoder, ResNet18
from .harness import Row, difference, make_row
from .timer import turns

FORGET_WEIGHT = 0.1
# a cycle: of the authors' code for classifiers and for diffusion models
RETAIN_STEPS = {"ResNet-18": 5, "decoder": 1}
Batch = tuple[Tensor, Tensor]


def cycle(arm: Any, forget: Batch, retain: Batch, phase: Phases) -> None:
    """One forget step and the model's retain steps."""
    for left in range(arm.retain_steps, -1, -1):
        forgets = left == arm.retain_steps
        inputs, labels = forget if forgets else retain
        arm.model.zero_grad()
        with phase("forward"):
            logits = arm.model(inputs)
            loss = (
                -FORGET_WEIGHT * arm.loss(logits, labels) if forgets else mean_loss(logits, labels)
            )
        with phase("backward"):
            loss.backward()
        if forgets:
            arm.forget(phase)
        else:
            arm.retain(phase, left == 0)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


FISHER_BATCHES = 2  # of each set


def saliency(arm: Any, forget: Batch, retain: Batch, phase: Phases) -> list[Tensor]:
    """Both Fishers from a few batches each, and the mask."""
    fishers = []
    for inputs, labels in (forget, retain):
        sums = arm.sums()
        for _ in range(FISHER_BATCHES):
            arm.model.zero_grad()
            with phase("forward"):
                loss = mean_loss(arm.model(inputs), labels)
            with phase("backward"):
                loss.backward()
            with phase("accumulation"):
                arm.accumulate(sums, 1.0 / FISHER_BATCHES)
        fishers.append(sums)
    with phase("mask build"):
        masks: list[Tensor] = arm.build(*fishers)
    return masks


Size = tuple[int, int]  # of a ResNet-18 and its batches: width, images


def problem(
    name: str, device: str, tiny: bool, size: Size | None
) -> tuple[str, nn.Module, Batch, Batch]:
    """(optimizer, model, forget batch, retain batch): of sizes a CPU can bear; larger on a GPU."""
    torch.manual_seed(0)
    large = device == "cuda"
    if name == "ResNet-18":
        width, batch = size or ((4, 2) if tiny else (64, 256) if large else (32, 16))
        model: nn.Module = ResNet18(width=width)
        batches = [
            (
                torch.randn(batch, 3, 32, 32, device=device),
                torch.randint(10, (batch,), device=device),
            )
            for _ in range(2)
        ]
        return "sgd", model.to(device), batches[0], batches[1]
    vocabulary, width, layers, length, batch = (
        (50, 64, 1, 8, 2)
        if tiny
        else (32_000, 1024, 12, 512, 8)
        if large
        else (8_192, 256, 4, 64, 8)
    )
    model = Decoder(vocabulary, width, layers, length)

    def draw() -> Tensor:
        return torch.randint(vocabulary, (batch, length), device=device)

    return "adamw", model.to(device), (draw(), draw()), (draw(), draw())


WORK: dict[str, Callable[[Any, Batch, Batch, Phases], Any]] = {
    "cycle": cycle,
    "Fisher and mask": saliency,
}


def measure(
    name: str,
    device: str,
    rounds: int = 7,
    tiny: bool = False,
    size: Size | None = None,
    inside: Any = None,
) -> list[Row]:
    """Rows of the whole and of every phase, arms in turn, of the model or of ``inside(model)``.

    Raises:
        AssertionError: weights or masks differ.
    """
    kind, model, forget, retain = problem(name, device, tiny, size)
    model = inside(model) if inside else model
    masks = {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters()}
    kinds: list[Any] = [*([Published] if device == "cuda" else []), Authors, Stock, Ours]
    start, ends, found = list(model.parameters()), [], []
    # with one retain step: after five, a rounding at the start has grown to a tenth of the change
    for make in kinds:
        arm = make(copy.deepcopy(model), masks, kind, 1)
        found.append(arm.bits(saliency(arm, forget, retain, Phases(device, False))))
        cycle(arm, forget, retain, Phases(device, False))
        ends.append(
            [p.detach() - q.detach() for p, q in zip(arm.model.parameters(), start, strict=True)]
        )
    # one ReLU that rounding puts on its other side moved a tiny network by 2 % (one draw in 60);
    # masks: one bit in 100
    for what, results, most in (("weights", ends, 0.1 if tiny else 1e-2), ("masks", found, 0.1)):
        for made, result in zip(kinds[1:], results[1:], strict=True):
            if not (error := difference(result, results[0])) < most:
                raise AssertionError(
                    f"{name}: the {what} of {made.name} and {kinds[0].name} differ by {error:.1e}; "
                    "nothing was timed"
                )
    del ends, found
    arms = [make(copy.deepcopy(model), masks, kind, RETAIN_STEPS[name]) for make in kinds]
    weights = sum(p.numel() for p in start)
    about_all = f"{weights / 1e6:.{1 if weights > 1e6 else 2}f}M, batch {forget[0].shape[0]}"
    rows = []
    for work, run in WORK.items():
        times: dict[tuple[str, str], list[float]] = defaultdict(list)
        about = f"{about_all}, {RETAIN_STEPS[name]} retain" if work == "cycle" else about_all
        for arm in arms:
            run(arm, forget, retain, Phases(device, False))
        for order in islice(turns(arms), rounds):
            for arm in order:
                whole, split = Phases(device, False), Phases(device, True)
                began = whole.wait()
                run(arm, forget, retain, whole)
                times["", arm.name].append(whole.wait() - began)
                run(arm, forget, retain, split)
                for phase, seconds in split.seconds.items():
                    times[phase, arm.name].append(seconds)
        names = [arm.name for arm in arms]  # in this order: ours last
        for (phase, arm_name), seconds in sorted(
            times.items(), key=lambda item: (item[0][0], names.index(item[0][1]))
        ):
            rows.append(
                make_row(
                    f"{name} {work}{': ' + phase if phase else f' ({about})'}", arm_name, seconds, 0
                )
            )
    return rows
