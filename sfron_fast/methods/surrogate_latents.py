"""Surrogates of identities, in the latent space of a generator (SUGAR, arXiv 2512.06562)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import model_device
from ..errors import by_keyword, integer, number, require
from ..losses import adaptive_mse
from ..models.modes import evaluating
from .descent import descend
from .original import only

Features = Callable[[Tensor], Tensor]  # outputs [samples, ...] -> what identifies them [samples, n]
ADAM: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0, "cosine": False}


class SurrogateLatents(nn.Module):
    """s(w) = mean - distance * f(w - mean) / |f(w - mean)| of latents w [samples, ...].

    Without a network f, w goes through the mean [...] to its other side, as in GUIDE (CVPR 2024).
    """

    mean: Tensor

    def __init__(self, mean: Tensor, distance: float, network: nn.Module | None = None) -> None:
        super().__init__()
        self.distance = number("distance", distance, 0.0, open_low=True)
        self.register_buffer("mean", mean)
        self.network = nn.Identity() if network is None else network

    def forward(self, latents: Tensor) -> Tensor:
        """Surrogates, of the latents' shape."""
        own = self.network((latents - self.mean).flatten(1))
        return self.mean - self.distance * F.normalize(own, dim=1).view_as(latents)


@by_keyword
def fit_surrogates(
    model: nn.Module,
    *,
    identities: Tensor,
    others: Tensor,
    distance: float,
    features: Features,
    feature_weight: float = 1.0,
    width: int = 128,
    epochs: int = 300,
    lr: float = 1e-3,
    seed: int = 0,
) -> SurrogateLatents:
    """A network f for these identities: near in output, but another identity.

    It makes mse(G(s(w)), G(w)) + feature_weight * cos(features of both) least, a mean over the
    identities; the generator stays as it is.

    Args:
        model: the generator, latents [samples, ...] -> outputs [samples, ...].
        identities: their latents [identities, ...].
        others: [latents, ...], whose mean is the centre.
        distance: of a surrogate from the centre; choose it as far as latents usually are.
        features: what tells identities apart: a network, or more than one side by side.
        width: of f, which has one hidden layer.
        epochs: steps over all identities, with Adam.
        seed: of the network's first weights.

    Raises:
        ValueError: latents that do not fit each other, a setting out of range, by name.
    """
    check_latents(identities, others)
    number("feature_weight", feature_weight, 0.0)
    integer("width", width, 1)
    size, device = identities[0].numel(), model_device(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, size))
    found = SurrogateLatents(others.mean(0), distance, network).to(device, identities.dtype)
    latents = identities.to(device)

    with only(model, []), evaluating(model), fixed(features):
        with torch.no_grad():
            target = model(latents)
            own = features(target)

        def losses(_: int) -> Iterator[Tensor]:
            outputs = model(found(latents))
            alike = F.cosine_similarity(features(outputs), own).mean()
            yield adaptive_mse(outputs, target, 0.0) + feature_weight * alike

        descend(found, losses, epochs=epochs, lr=lr, **ADAM)
    return found.requires_grad_(False).eval()


def fixed(features: Features | None) -> AbstractContextManager[None]:
    """Within, a network that tells identities apart gets no gradients of its own."""
    return only(features, []) if isinstance(features, nn.Module) else nullcontext()


def check_latents(identities: Tensor, others: Tensor) -> None:
    """Raise ValueError unless both are latents of one shape."""
    for name, given in (("identities", identities), ("others", others)):
        good = given.dim() > 1 and len(given) > 0 and given.is_floating_point()
        shown = f"{tuple(given.shape)} of {given.dtype}"
        require(good, name, "latents [samples, ...] of a floating dtype", shown)
    wanted, found = tuple(identities.shape[1:]), tuple(others.shape[1:])
    require(wanted == found, "others", f"latents of {wanted}, as the identities", found)
