"""SUGAR (arXiv 2512.06562, WACV 2026): a generator G draws identities from latents w. Each unwanted
one is diverted to a surrogate s(w) of its own, learnt before by ``fit_surrogates``:

    L(w) + sum over neighbours v of L(v) + penalty / 2 sum F (theta - theta_0)^2,   where
    L(w) = mse(G_theta(w), G_0(s(w))) + feature_weight * (1 - cos(features of both))
    v = w + r (u - w) / |u - w|,    r uniform in [0, reach], u one of the other latents

Departures. The released Fisher is the squared gradient of an error between two networks that are
equal before the first request, and so 0; here it is that of sampled outputs, over the other
latents. ``features`` stand for a perceptual distance and a face network at once. theta_0 and G_0
are the model as a call finds it: of a sequence of requests no older model is kept, where the
released code takes G_0 from before the first. |u - w| is each latent's own, not a batch's.
``replay`` is GUIDE's (CVPR 2024), and off.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import model_device
from ..errors import by_keyword, integer, number
from ..losses import adaptive_mse
from ..models.modes import evaluating
from ..saliency.fisher import Fisher
from .descent import descend
from .elastic import Elastic, sampled_fisher
from .original import Original
from .surrogate_latents import ADAM, Features, check_latents, fixed


@by_keyword
def sugar(
    model: nn.Module,
    *,
    identities: Tensor,
    others: Tensor,
    surrogates: Callable[[Tensor], Tensor],
    reach: float,
    features: Features | None = None,
    feature_weight: float = 0.1,
    neighbours: int = 2,
    penalty: float = 640.0,
    fisher: Fisher | None = None,
    replay: float = 0.0,
    batch: int = 32,
    seed: int = 0,
    epochs: int = 300,
    lr: float = 2e-4,
    **settings: Any,
) -> nn.Module:
    """SUGAR: one request, in place; returns the model. A sequence of requests is as many calls.

    Args:
        model: the generator, latents [samples, ...] -> outputs [samples, ...].
        identities: latents [identities, ...] to divert.
        others: latents [latents, ...] as the generator's users draw them.
        surrogates: of ``fit_surrogates``, or another function of latents.
        reach: the largest distance of a neighbour that goes along.
        features: as of ``fit_surrogates``; None = L is the squared error alone.
        neighbours: of each identity, drawn anew in each step.
        penalty: of the elastic weights; 0 = without them, the default served a VAE of digits.
        fisher: instead of ``sampled_fisher`` of the model as it is now, over ``others``.
        replay: weight of the squared error against G_0 at others, as many as there are identities
            and neighbours in a step, drawn anew.
        batch: identities of a step; an epoch is a pass over all.
        seed: of all draws.
        settings: of ``descend``; Adam, a constant lr and eval mode if they do not say otherwise.

    Raises:
        ValueError: latents that do not fit each other, a Fisher of another model, a setting out of
            range, by name.
    """
    check_latents(identities, others)
    numbers = {"reach": reach, "feature_weight": feature_weight, "replay": replay}
    for name, value in {**numbers, "penalty": penalty}.items():
        number(name, value, 0.0)
    integer("neighbours", neighbours, 0)
    integer("batch", batch, 1)
    device, draw = model_device(model), torch.Generator().manual_seed(seed)
    identities, others = identities.to(device), others.to(device)
    original, anchor = Original(model), None
    if penalty > 0.0:
        known = sampled_fisher(model, others, seed=seed) if fisher is None else fisher
        anchor = Elastic(model, known, penalty)

    def drawn(count: int) -> Tensor:
        return others[torch.randint(len(others), (count,), generator=draw).to(device)]

    @torch.no_grad()
    def targets(latents: Tensor, kept: Tensor) -> Tensor:
        with evaluating(model), original.weights(model):
            return model(torch.cat([surrogates(latents), kept]))

    def losses(_: int) -> Iterator[Tensor]:
        for some in identities[torch.randperm(len(identities), generator=draw)].split(batch):
            near = some.repeat(neighbours, *[1] * (some.dim() - 1))
            way = F.normalize((drawn(len(near)) - near).flatten(1), dim=1)  # 0 where u = w
            far = reach * torch.rand(len(near), 1, generator=draw).to(near)
            latents = torch.cat([some, near + (far * way).view_as(near)])
            kept = drawn(len(latents) if replay > 0.0 else 0)
            target, count = targets(latents, kept), len(latents)
            outputs = model(torch.cat([latents, kept]))
            loss = adaptive_mse(outputs[:count], target[:count], 0.0)
            if features is not None:
                pair = features(outputs[:count]), features(target[:count])
                loss = loss + feature_weight * (1.0 - F.cosine_similarity(*pair).mean())
            loss = (1 + neighbours) * loss  # a sum over each identity and its neighbours
            if replay > 0.0:
                loss = loss + replay * adaptive_mse(outputs[count:], target[count:], 0.0)
            yield loss if anchor is None else loss + anchor()

    usual = {**ADAM, "training": False}
    with fixed(features):
        return descend(model, losses, epochs=epochs, lr=lr, **{**usual, **settings})
