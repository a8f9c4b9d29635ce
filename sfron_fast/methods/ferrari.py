"""Ferrari (arXiv 2405.17462, NeurIPS 2024): one client of federated learning makes a feature of its
inputs matter less, on its own data, and gives the model back.

    s(x) = E over d of |f(x) - f(x + d)|_2 / |d|_2             min over theta of the mean of s

f are the logits and d is normal noise on the feature's coordinates alone, its sigma drawn anew for
each of ``draws`` perturbations. Both branches carry gradient, as the equation says. In the released
code the perturbed one has none (``through_perturbed=False``): at no rate tried did that take a
backdoor away and leave the model (examples/federated/ferrari).

Departures: s is least where f is constant, and the class that a backdoor led to is the first to go.
So ``retain_weight`` times the cross-entropy of clean data of the same client is added to it (no
``retain``, or 0: as published). s is a mean over the batch, where the code has a sum. Noise is not
clipped, so that |d| is the length of what was added.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import call, model_device
from ..data.endless import EndlessLoader
from ..errors import by_keyword, integer, number, require
from ..tasks import Classification
from ..tasks.outputs import logits_of
from .descent import Loader, batches, descend


@by_keyword
def ferrari(
    model: nn.Module,
    *,
    forget: Loader,
    feature: Tensor,
    retain: Loader | None = None,
    retain_weight: float = 1.0,
    draws: int = 20,
    sigmas: tuple[float, float] = (0.05, 1.0),
    seed: int = 0,
    through_perturbed: bool = True,
    epochs: int = 1,
    lr: float = 1e-3,
    **settings: Any,
) -> nn.Module:
    """Ferrari, in place and in eval mode, so that f(x) and f(x + d) differ by d alone; returns the
    model.

    Args:
        forget: batches (inputs, labels) of inputs that have the feature; labels are not read.
        feature: which coordinates of an input are it, bool, of one input's shape.
        retain: batches (inputs, labels) of the client's clean data, taken in turn beside those of
            ``forget``; None = without.
        draws, sigmas: perturbations of an input in each step, and the range of their sigma.
        seed: of the perturbations.
        through_perturbed: False = without gradient there, as released.
        settings: of ``descend``; a constant lr and no weight decay if they do not say otherwise.

    Raises:
        ValueError: a setting out of range, by name; an empty loader; a feature of another shape, or
            without a coordinate.
    """
    number("retain_weight", retain_weight, 0.0)
    integer("draws", draws, 1)
    low = number("sigmas[0]", sigmas[0], 0.0, open_low=True)
    number("sigmas[1]", sigmas[1], low)
    task, device = Classification(), model_device(model)
    good = feature.dtype == torch.bool and bool(feature.any())
    found = f"{feature.dtype} with {int(feature.count_nonzero())} of them"
    require(good, "feature", "a bool tensor with a coordinate in it", found)
    feature = feature.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    kept = None if retain is None or retain_weight == 0.0 else EndlessLoader(retain, "retain")

    def terms(inputs: Tensor) -> Iterator[Tensor]:
        noise = perturbations(inputs, feature, draws, sigmas, generator)
        yield sensitivity(model, inputs, noise, through_perturbed=through_perturbed).mean()
        if kept is not None:
            yield retain_weight * task.mean_loss(model, kept.batch(task, device))

    def losses(_: int) -> Iterator[Iterator[Tensor]]:
        for inputs, _ in batches(model, forget, "forget", task):
            yield terms(inputs)

    usual: dict[str, Any] = {"cosine": False, "weight_decay": 0.0, "training": False}
    return descend(model, losses, epochs=epochs, lr=lr, **{**usual, **settings})


def perturbations(
    inputs: Tensor,
    feature: Tensor,
    draws: int,
    sigmas: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Noise [draws, samples, ...], zero outside the feature, of one sigma for each draw and sample.

    Raises:
        ValueError: the feature has not the shape of an input.
    """
    shape = tuple(inputs.shape[1:])
    require(feature.shape == shape, "feature", f"an input's shape {shape}", tuple(feature.shape))
    like: dict[str, Any] = {"device": inputs.device, "dtype": inputs.dtype}
    ones = (1,) * len(shape)
    sigma = torch.empty(draws, len(inputs), *ones, **like).uniform_(*sigmas, generator=generator)
    noise = torch.randn(draws, *inputs.shape, generator=generator, **like)
    return (noise * sigma).masked_fill_(~feature, 0.0)


def sensitivity(
    model: nn.Module, inputs: Tensor, noise: Tensor, *, through_perturbed: bool = True
) -> Tensor:
    """s of each input [samples], over ``noise`` [draws, samples, ...]; one pass of the model over
    the inputs and all that is perturbed.
    """
    draws, samples = noise.shape[:2]
    both = torch.cat([inputs, (inputs + noise).flatten(0, 1)])
    plain, perturbed = logits_of(call(model, both), "model").split([samples, draws * samples])
    if not through_perturbed:
        perturbed = perturbed.detach()
    change = (perturbed.view(draws, samples, -1) - plain).norm(dim=2)
    return (change / noise.flatten(2).norm(dim=2)).mean(0)
