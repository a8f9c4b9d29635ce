"""Certified unlearning in decentralised federated learning (arXiv 2601.06436): a Newton step on
what remains, a bound on what is left to the retrained model, and Gaussian noise to cover it.

    theta' = theta - H^-1 grad F(theta)                  F of the clients that remain: curvature.py
    R      = (|grad F(theta')| + tolerance) / decay      >= |theta' - theta_retrained|
    released: theta' + N(0, sigma^2 I),   sigma the least that hides R at (epsilon, delta)

The clients' weights in F are those of training: 1 / K for K clients, however many samples each has.

What the certificate assumes: logits linear in the weights (else refused), cross-entropy, L2 on all
weights. Retraining ends where |grad F| <= tolerance, and is released with noise of the same sigma.
sigma is found from the data and not hidden itself. Weights released before and messages between
clients are not covered, nor two requests taken together, nor that floats are no real numbers.

Departures: the paper's step, bound and sigma were not to be found. The step starts from the
gradient of what remains: where training has converged it is minus that of what goes. The curvature
is whole, where the paper has a sparse Fisher matrix. The bound is strong convexity's, of the
gradient after the step. sigma is the exact one (Balle and Wang, ICML 2018).
"""

from dataclasses import dataclass
from math import erfc, exp, sqrt

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..errors import by_keyword, number
from .curvature import Objective, Total, conjugate_gradients
from .descent import Loader


@dataclass(frozen=True)
class Certificate:
    """What was proven of the weights before the noise, and the noise."""

    distance: float  # R, from the retrained weights
    sigma: float
    epsilon: float
    delta: float
    products: int  # with the curvature


@by_keyword
def certified(
    model: nn.Module,
    *,
    remaining: Loader,
    decay: float,
    weight: float = 1.0,
    total: Total | None = None,
    epsilon: float = 1.0,
    delta: float = 1e-5,
    tolerance: float = 0.0,
    residual: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Certificate:
    """The step and the noise, in place; returns the certificate. In eval mode, best in fp64.

    All clients call it at once, each with the same weights and its own data.

    Args:
        remaining: batches (inputs, labels) of what this client keeps.
        decay: the L2 coefficient of training, > 0.
        weight: this client's in F; those of all clients sum to 1.
        total: the sum of a tensor over all clients, the same for each; None = there is one client.
        tolerance: norm of the gradient at which retraining would end.
        residual: what the solve may leave of the gradient's norm.
        generator: of this client's share of the noise; None = seeded by the operating system.

    Raises:
        ValueError: a setting out of range; no batch; weights that do not sum to 1; logits that are
            not linear in the trainable weights.
    """
    gaussian_sigma(1.0, epsilon, delta)  # refuses before anything is written
    distance, products = newton(
        model,
        remaining=remaining,
        decay=decay,
        weight=weight,
        total=total,
        tolerance=tolerance,
        residual=residual,
    )
    sigma = gaussian_sigma(distance, epsilon, delta)
    add_noise(model, sigma, total, generator)
    return Certificate(distance, sigma, epsilon, delta, products)


def newton(
    model: nn.Module,
    *,
    remaining: Loader,
    decay: float,
    weight: float = 1.0,
    total: Total | None = None,
    tolerance: float = 0.0,
    residual: float = 1e-2,
) -> tuple[float, int]:
    """The step alone, in place: R, and the number of products. Arguments as ``certified``."""
    number("tolerance", tolerance, 0.0)
    number("residual", residual, 0.0, 1.0, open_low=True)
    before = Objective(model, remaining, decay, weight, total)
    before.check()
    step, products = conjugate_gradients(before.product, before.gradient(), residual)
    before.move(-step)
    after = Objective(model, remaining, decay, weight, total)
    return (float(after.gradient().norm()) + tolerance) / decay, products


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
