"""Elastic weights: a pull to where the weights were, stiffer where the Fisher is larger."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import model_device
from ..errors import integer, require
from ..models.modes import evaluating
from ..saliency.fisher import Fisher, estimate_fisher
from ..tasks import Task


class Elastic:
    """penalty / 2 sum F (theta - theta_0)^2 over the trainable weights, theta_0 being what they are
    when this is made.

    Raises:
        ValueError: a Fisher of other weights.
    """

    def __init__(self, model: nn.Module, fisher: Mapping[str, Tensor], penalty: float) -> None:
        self.penalty, self.terms = penalty, []
        for name, p in model.named_parameters():
            if p.requires_grad:
                found = tuple(fisher[name].shape) if name in fisher else "none"
                same = found == tuple(p.shape)
                require(same, "fisher", f"{tuple(p.shape)} for {name!r}", found)
                self.terms.append((fisher[name].to(p.device), p, p.detach().clone()))

    def __call__(self) -> Tensor:
        """The penalty [] of the weights as they are now."""
        each = [(f * (p - start).square()).sum() for f, p, start in self.terms]
        return 0.5 * self.penalty * torch.stack(each).sum()


def sampled_fisher(
    generator: nn.Module, latents: Tensor, *, draws: int = 1, seed: int = 0
) -> Fisher:
    """The diagonal Fisher of a deterministic generator: of outputs drawn around what it gives.

    With p(x | w) = N(G(w), n), n being the elements of an output, F = E over w and x of
    (d log p / d theta)^2. That is the mean over latents and elements of (d G / d theta)^2, in the
    unit of a mean squared error whatever n is; no data is needed.

    Args:
        latents: [latents, ...] of a floating dtype.
        draws: outputs drawn for each.

    Raises:
        ValueError: what ``estimate_fisher`` refuses.
    """
    integer("draws", draws, 1)
    with evaluating(generator), torch.no_grad():
        shape = generator(latents[:1].to(model_device(generator))).shape[1:]
    task = _Drawn(shape, seed)
    return estimate_fisher(
        generator, latents.split(256), task=task, estimator="sample", draws=draws
    )


class _Drawn(Task):
    """Latents, each with an output that is drawn around the model's own."""

    def __init__(self, shape: torch.Size, seed: int) -> None:
        self.shape, self.draw = shape, torch.Generator().manual_seed(seed)

    def prepare(self, batch: Any, device: torch.device, name: str = "loader") -> Any:
        latents = super().prepare(batch, device, name)
        noise = torch.randn(len(latents), *self.shape, generator=self.draw).to(latents)
        return latents, noise * self.shape.numel() ** 0.5

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """What has the gradient of -log p at the output that was drawn, G + noise."""
        latents, noise = batch
        return -(noise * model(latents)).flatten(1).mean(1)
