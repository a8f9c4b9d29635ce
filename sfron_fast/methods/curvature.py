"""The regularised cross-entropy of several clients: its gradient, products with its curvature, and
the solve by conjugate gradients. No matrix is formed.

    F(theta) = sum_i w_i mean_i l(theta) + decay / 2 |theta|^2       over clients i
    H v      = sum_i w_i mean_i J^T (diag(p) - p p^T) J v + decay v      p = softmax of the logits
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..data.batches import arguments
from ..errors import number, require
from ..models.modes import evaluating, recording
from ..tasks import Classification
from ..tasks.outputs import logits_of
from .descent import Loader, batches

Total = Callable[[Tensor], Tensor]  # the sum over all clients, the same for each


class Objective:
    """F at the weights as they are; all clients make the same calls.

    H is the Gauss-Newton matrix: the Hessian where logits are linear in the weights. One graph of
    each batch is kept: run backwards it is J^T u, run twice J v.

    Args:
        loader: batches (inputs, labels) of this client.
        weight: w_i of this client.
        total: None = there is one client.
    """

    def __init__(
        self, model: nn.Module, loader: Loader, decay: float, weight: float, total: Total | None
    ) -> None:
        number("decay", decay, 0.0, open_low=True)
        number("weight", weight, 0.0, 1.0)
        self.model, self.decay, self.weight = model, decay, weight
        self.total: Total = (lambda values: values) if total is None else total
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        require(bool(named), "model", "a trainable weight", "none")
        self.names, self.weights = list(named), list(named.values())
        self.at = parameters_to_vector(self.weights).detach()  # [weights]
        self.parts: list[Any] = []
        samples, task = 0, Classification()
        with evaluating(model), recording(model):
            for batch in batches(model, loader, "remaining", task):
                task.check(model, batch)
                logits, pull, *_ = vjp(partial(self.logits, batch), self.at)
                push = vjp(partial(_first, pull), torch.zeros_like(logits))[1]
                self.parts.append((batch, logits.detach(), pull, push))
                samples += len(logits)
        self.scale = weight / samples

    def logits(self, batch: Any, at: Tensor) -> Tensor:
        """Of a batch [samples, classes] by the weights ``at``."""
        pieces = at.split([p.numel() for p in self.weights])
        shaped = [piece.view_as(p) for piece, p in zip(pieces, self.weights, strict=True)]
        named = dict(zip(self.names, shaped, strict=True))
        return logits_of(functional_call(self.model, named, *arguments(batch[0])), "model")

    def check(self) -> None:
        """Raise ValueError for clients' weights that do not sum to 1, and for logits not linear in
        the model's weights, by what twice the weights say.
        """
        whole = float(self.total(self.at.new_tensor([self.weight])))
        sums = "weights that sum to 1 over all clients"
        require(abs(whole - 1.0) < 1e-5, "weight", sums, whole)
        linear = "logits that are linear in its trainable weights"
        with evaluating(self.model), torch.no_grad():
            for batch, logits, _, push in self.parts:
                twice = logits + _first(push, self.at)
                good = torch.allclose(self.logits(batch, 2 * self.at), twice, 1e-3, 1e-4)
                require(good, "model", linear, "others", "freeze all layers but the last")

    def gradient(self) -> Tensor:
        """Of F [weights]."""
        found = torch.zeros_like(self.at)
        for batch, logits, pull, _ in self.parts:
            error = logits.softmax(1) - F.one_hot(batch[1], logits.shape[1])
            found += _first(pull, self.scale * error)
        return self.total(found) + self.decay * self.at

    def product(self, v: Tensor) -> Tensor:
        """H v [weights]."""
        found = torch.zeros_like(self.at)
        for _, logits, pull, push in self.parts:
            p, change = logits.softmax(1), _first(push, v)
            across = p * (change - (p * change).sum(1, keepdim=True))
            found += _first(pull, self.scale * across)
        return self.total(found) + self.decay * v

    def move(self, step: Tensor) -> None:
        """The model's weights by ``step`` [weights]."""
        vector_to_parameters(self.at + step, self.weights)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, residual: float
) -> tuple[Tensor, int]:
    """x [n] with |b - A x| <= residual |b| for a positive definite A given by its ``product``, and
    the number of products: 10 n at most, where rounding keeps the residual from getting there.
    """
    x, left, count = torch.zeros_like(b), b.clone(), 0
    direction, square = left.clone(), left @ left
    while square.sqrt() > residual * b.norm() and count < 10 * len(b):
        image = product(direction)
        length = square / (direction @ image)
        x += length * direction
        left -= length * image
        before, square = square, left @ left
        direction = left + square / before * direction
        count += 1
    return x, count


def _first(backwards: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor) -> Tensor:
    return backwards(u)[0]
