"""Gaussian noise that hides a distance: the least sigma (Balle and Wang, ICML 2018), and the noise
that several clients draw together.
"""

from math import erfc, exp, sqrt

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..errors import number
from .curvature import Total


def gaussian_sigma(distance: float, epsilon: float, delta: float) -> float:
    """The least sigma with which N(a, sigma^2 I) and N(b, sigma^2 I) are (epsilon, delta)
    indistinguishable for all a, b so far apart (Balle and Wang, theorem 8); by bisection.
    """
    number("epsilon", epsilon, 0.0, 100.0, open_low=True)
    number("delta", delta, 0.0, 1.0, open_low=True)

    def told(sigma: float) -> bool:
        a, b = 0.5 / sigma, epsilon * sigma
        return _below(a - b) - exp(epsilon) * _below(-a - b) > delta

    low, high = 1e-9, 1e9  # at a distance of 1
    while high > low * (1.0 + 1e-12):
        middle = sqrt(low * high)
        low, high = (middle, high) if told(middle) else (low, middle)
    return distance * high


def _below(t: float) -> float:
    """Share of a standard normal that lies below t."""
    return 0.5 * erfc(-t / sqrt(2.0))


@torch.no_grad()
def add_noise(
    model: nn.Module, sigma: float, total: Total | None, generator: torch.Generator | None
) -> None:
    """N(0, sigma^2) on every trainable weight, in place; each client draws an equal share."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    weights = [p for p in model.parameters() if p.requires_grad]
    flat = parameters_to_vector(weights)
    noise = torch.randn(len(flat), generator=generator, dtype=flat.dtype).to(flat.device)
    mine = torch.cat([noise, noise.new_ones(1)])
    drawn = mine if total is None else total(mine)  # the last: how many clients
    vector_to_parameters(flat + sigma * drawn[-1].rsqrt() * drawn[:-1], weights)
