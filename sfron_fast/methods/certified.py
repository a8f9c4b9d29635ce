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
gradient after the step. sigma is the exact one: gaussian_noise.py.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import by_keyword, integer, number
from .curvature import Objective, Total, conjugate_gradients
from .descent import Loader
from .gaussian_noise import add_noise, gaussian_sigma


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
    steps: int = 1,
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
        residual: what each solve may leave of the gradient's norm.
        steps: how many; the paper's is one. A second one costs as much, and R is far smaller.
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
        steps=steps,
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
    steps: int = 1,
) -> tuple[float, int]:
    """The steps alone, in place: R, and the number of products. Arguments as ``certified``."""
    number("tolerance", tolerance, 0.0)
    number("residual", residual, 0.0, 1.0, open_low=True)
    integer("steps", steps, 1)
    given = (model, remaining, decay, weight, total)
    here = Objective(*given)
    here.check()
    gradient, products = here.gradient(), 0
    for _ in range(steps):
        step, count = conjugate_gradients(here.product, gradient, residual)
        here.move(-step)
        here = Objective(*given)
        gradient, products = here.gradient(), products + count
    return (float(gradient.norm()) + tolerance) / decay, products
