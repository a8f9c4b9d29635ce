"""The cases of a diffusion model: a whole cycle of class forgetting, and a Fisher of eight draws.

Noise and timesteps are drawn within: by the others with torch.randn, by this package by key, so
that a run resumes and ranks share it. Arms are compared on one draw. Products of matrices take the
time, so there is no probe.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import sfron_fast as sf
from examples.diffusion.denoisers import KEPT, STEPS, UNet
from examples.diffusion.digits import CLASSES, NULL
from sfron_fast.evaluation.diffusion import LossProfile

from ..harness import Arm, Case
from .arms import change
from .loops import Authors, Ours, Phases, Published, Stock
from .row_arms import FLOOR, TEMPERATURE, weighted

DRAWS = 8
CAP = 3.0  # times the usual loss, met by some samples
DROP = 0.1
USUAL = LossProfile(torch.linspace(1.0, 0.2, 10), torch.ones(10, dtype=torch.int64), STEPS)
Batch = tuple[Tensor, Tensor]  # images and classes


class Size(NamedTuple):
    """Of a UNet and its batches of square images."""

    channels: int
    levels: int
    side: int
    batch: int
    fisher: int  # samples of the Fisher


GPU, CPU, TINY = Size(128, 4, 32, 128, 64), Size(32, 3, 32, 16, 8), Size(4, 2, 8, 3, 2)


def cases(kind: str, device: str, tiny: bool) -> list[Case]:
    size = TINY if tiny else GPU if kind == "cuda" else CPU
    return [cycle_case(size, device, tiny), fisher_case(size, device)]


def unet(size: Size, device: str) -> nn.Module:
    torch.manual_seed(0)
    return UNet(size.channels, 64, image_channels=3, levels=size.levels).to(device).eval()


def images(count: int, size: Size, device: str) -> Batch:
    on = {"generator": torch.Generator(device).manual_seed(6), "device": device}
    x0 = torch.rand(count, 3, size.side, size.side, **on).mul_(2.0).sub_(1.0)
    return x0, torch.randint(CLASSES, (count,), **on)


def task() -> sf.Denoising:
    return sf.Denoising(KEPT, null=NULL, drop=DROP, reference=USUAL)


def drawn(batch: Batch, drop: float) -> dict[str, Any]:
    """By torch, as everybody does."""
    x0, labels = batch
    t = torch.randint(STEPS, (len(x0),), device=x0.device)
    kept = KEPT.to(x0)[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(x0)
    gone = torch.rand(len(x0), device=x0.device) < drop
    return {
        "noisy": kept.sqrt() * x0 + (1.0 - kept).sqrt() * noise,
        "target": noise,
        "t": t,
        "condition": torch.where(gone, NULL, labels),
    }


def errors(model: Callable[..., Tensor], batch: dict[str, Any]) -> Tensor:
    """Mean squared error of each image."""
    said = model(batch["noisy"], batch["t"], class_labels=batch["condition"])
    return (said - batch["target"]).square().flatten(1).mean(1)


def title(size: Size, model: nn.Module) -> str:
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{weights:.{1 if weights > 1 else 2}f}M, {size.side} x {size.side}"


def cycle_case(size: Size, device: str, tiny: bool) -> Case:
    """A forget step by the loss relative to its timestep's, with a cap; a retain step; the slow
    interpolation.
    """
    model, batch = unet(size, device), images(size.batch, size, device)
    on = {"generator": torch.Generator(device).manual_seed(7), "device": device}
    masks = {n: torch.rand(p.shape, **on) < 0.5 for n, p in model.named_parameters()}

    def arm(make: Any) -> Arm:
        part, own, known = make(copy.deepcopy(model), masks, "adamw", 1), task(), task()
        where = torch.device(device)
        fixed = {name: known.prepare(batch, where, name) for name in ("forget", "retain")}

        def draw(name: str) -> dict[str, Any]:
            if make is Ours:
                return own.prepare(batch, where, name)
            return drawn(batch, DROP if name == "retain" else 0.0)

        def adaptive(forget: dict[str, Any]) -> Tensor:
            if make is Ours:
                limit = CAP, own.usual(forget)
                return own.ceiling_loss(part.model, forget, TEMPERATURE, FLOOR, *limit)[0]
            return weighted(errors(part.model, forget) / USUAL.at(forget["t"]), CAP)

        def run(draw: Callable[[str], dict[str, Any]] = draw) -> None:
            phase = Phases(device, False)
            part.model.zero_grad()
            (-adaptive(draw("forget"))).backward()
            part.forget(phase)
            part.model.zero_grad()
            retain = draw("retain")
            loss = own.mean_loss(part.model, retain) if make is Ours else None
            (errors(part.model, retain).mean() if loss is None else loss).backward()
            part.retain(phase, last=True)

        def values() -> list[Tensor]:
            return [p.detach() for p in part.model.parameters()]

        check = partial(change, values, partial(run, fixed.__getitem__))
        return Arm(part.name, run, check, 0.1 if tiny else 1e-2, values)

    kinds = [*([Published] if device == "cuda" else []), Authors, Stock, Ours]
    name = f"diffusion cycle of {title(size, model)}, batch {size.batch}"
    return Case(name, [partial(arm, kind) for kind in kinds], seconds=6.0)


def fisher_case(size: Size, device: str) -> Case:
    """Each draw of each image squared by itself."""
    model, batch = unet(size, device), images(size.fisher, size, device)
    named = dict(model.named_parameters())
    share = 1.0 / (DRAWS * size.fisher)

    def by_torch() -> list[dict[str, Any]]:
        return [drawn(batch, 0.0) for _ in range(DRAWS)]

    def by_key() -> list[dict[str, Any]]:
        """As the estimate draws."""
        one = task()
        with one.estimating(0, 1):
            return [one.prepare(batch, torch.device(device)) for _ in range(DRAWS)]

    def one_by_one(draws: list[dict[str, Any]]) -> list[Tensor]:
        sums = [torch.zeros_like(p) for p in named.values()]
        for each in draws:
            for i in range(size.fisher):
                model.zero_grad()
                keys = ("noisy", "target", "t", "condition")
                errors(model, {key: each[key][i : i + 1] for key in keys}).sum().backward()
                for f, p in zip(sums, named.values(), strict=True):
                    f += p.grad**2 * share
        return sums

    def by_vmap(draws: list[dict[str, Any]]) -> list[Tensor]:
        sums = [torch.zeros_like(p) for p in named.values()]

        def loss(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
            noisy, target, t, condition = (part.unsqueeze(0) for part in sample)
            known = {"noisy": noisy, "target": target, "t": t, "condition": condition}

            def call(*args: Any, **more: Any) -> Tensor:
                return functional_call(model, params, args, more)

            return errors(call, known).sum()

        gradients = vmap(grad(loss), (None, 0, 0, 0, 0), chunk_size=32)
        fixed = {name: p.detach() for name, p in named.items()}
        for each in draws:
            parts = (each[key] for key in ("noisy", "target", "t", "condition"))
            found = gradients(fixed, *parts)
            for f, g in zip(sums, found.values(), strict=True):
                f.add_(g.square_().sum(0), alpha=share)
        return sums

    def arm(name: str, add: Callable[[list[dict[str, Any]]], list[Tensor]]) -> Arm:
        return Arm(name, lambda: add(by_torch()), lambda: add(by_key()), 1e-3)

    def ours() -> Arm:
        one = task()

        def run() -> list[Tensor]:
            found = sf.estimate_fisher(model, [batch], task=one, estimator="sample", draws=DRAWS)
            return [found[name] for name in named]

        return Arm("sfron_fast", run, run, 1e-3)

    made: list[Callable[[], Arm]] = [
        partial(arm, "authors' style, sample by sample", one_by_one),
        partial(arm, "stock, torch.func.vmap", by_vmap),
        ours,
    ]
    name = f"diffusion Fisher of {title(size, model)}, {size.fisher} images, {DRAWS} draws"
    return Case(name, made, seconds=6.0)
